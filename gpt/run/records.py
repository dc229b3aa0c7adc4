"""The JSON records through which a run's processes talk to each other: one class for each file.

The launcher, the node tasks and the workers read and write these files through the classes here. Field names
are the keys on disk, with one exception: a *job run* is called `turn` there.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data_pipeline.errors import ConfigError
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json, write_json


def _without_surrogates(value: object) -> object:
    """A text as it can be printed and sent: file names that are not UTF-8 have surrogates in Python."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_without_surrogates)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
ProcessId = Annotated[int, Field(ge=1, lt=2**31)]  # 0 and negative numbers mean groups of processes


class Record(BaseModel):
    """The content of one JSON file; unknown keys are ignored, so that a newer version can add some."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record at `path`, or None when the file is missing.

        Raises ConfigError when the file is garbled or a key is missing or of the wrong type.
        """
        content = read_json(path)
        if content is None:
            return None
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            wrong = ", ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ConfigError(
                f"{path} is not as this version of Outlast writes it ({wrong}). If the run's job is over, "
                "remove the file."
            ) from None

    @classmethod
    def read_unless_garbled(cls, path: Path) -> Self | None:
        """The record at `path`, or None when it is missing or garbled. Raises OSError."""
        try:
            return cls.read(path)
        except ConfigError:
            return None

    @classmethod
    def read_or_none(cls, path: Path) -> Self | None:
        """The record at `path`, or None when it is missing, garbled or unreadable at this moment."""
        try:
            return cls.read_unless_garbled(path)
        except OSError:
            return None

    def write(self, path: Path) -> None:
        """Write the record so that a reader finds the old file or the new one, never a part."""
        write_json(path, self.model_dump(mode="json", by_alias=True))


class Worker(Record):
    """One worker process of an attempt."""

    rank: Count
    node: Count
    host: Text
    pid: ProcessId


class Owner(Record):
    """attempts/N/OWNER.json: which job run made the attempt, written as soon as its number is claimed."""

    attempt: Count = 0
    time: float = 0.0
    host: Text = ""
    job: str | None = None
    job_run: Count = Field(default=0, alias="turn")
    world_size: Count = 0
    checkpoint_step: Count | None = None
    workers: tuple[Worker, ...] = ()


class Result(Record):
    """attempts/N/result.json: how the attempt ended. A superseded attempt leaves none."""

    exit_code: ExitCode
    cause: Text


class Job(Record):
    """job.json: the newest submission. `process` identifies a local job beyond its reusable process id."""

    submission: Count
    executor: str
    job_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")  # becomes an argument of other commands
    host: Text
    pid: ProcessId | None
    process: str | None
    run_inode: Count
    submitted_at: float


class JobOutcome(Record):
    """submission/N/outcome.json: how the job ended, as its first node task wrote it."""

    exit_code: ExitCode
    cause: Text
    attempt: Count | None
    is_cancelled: bool = False  # a person cancelled it in the scheduler


class StopRequest(Record):
    """RUN/stop: a request to save and stop. The file may also be empty: then all defaults hold.

    A person's request ends the run until it is resumed; with `requeue` it ends this job run only. `now` kills
    the workers without saving.
    """

    reason: Text = "stop file"
    time: float = 0.0
    now: bool = False
    requeue: bool = False


class MeetingPoint(Record):
    """submission/N/meeting-JOB-RUN.json: where the nodes of a job run find the first one."""

    address: str
    port: Annotated[int, Field(ge=1, lt=2**16)]


class NodeFailure(Record):
    """submission/N/failure-JOB-RUN-NODE.json: why one node of a job run failed."""

    cause: Text


class BadNode(Record):
    """A line of bad_nodes.jsonl: a node that failed its check."""

    node: Text
    reason: Text = ""
    attempt: Count | None = None


class SentLine(Record):
    """A line of metrics.jsonl that MLflow has received: its step, the byte where it begins, and its time."""

    step: int
    begins: int
    time: float


class TrackingState(Record):
    """tracking.json: how much of the record MLflow has received, and for which run directory (its inode).

    `marks` are some of the lines that were sent, oldest first, the last one among them: they tell a record
    that was cut back and written anew from one that only grew.
    """

    run_id: str
    inode: Count
    sent_step: Count
    has_sent_scores: bool = True
    marks: tuple[SentLine, ...] = ()
    overtaken_step: int = 0  # MLflow holds points of a course that was left, up to this step
    is_described: bool = True
    experiment: str | None = None
    described_attempt: int = 0


class Sidecar(StrEnum):
    """The sidecars of a job."""

    TRACKING = "tracking"
    MIRRORING = "mirroring"


class Health(StrEnum):
    """How a sidecar fares."""

    WORKING = "working"  # its last try succeeded
    FAILING = "failing"  # its last try failed, and it tries again
    DEAD = "dead"  # its process has ended unasked, and is started again
    DONE = "done"  # it has ended, and nothing is left to send
    INCOMPLETE = "incomplete"  # it has ended before everything was sent


class SidecarHealth(Record):
    """sidecar-NAME.json: what a sidecar has achieved, and what keeps it from more.

    The sidecar writes it while it lives, and the node task once it is dead. `step` is the newest step that
    was sent, or the newest checkpoint that was copied. `notes` tell what the sidecar decided by itself.
    """

    health: Health
    since: float
    time: float
    last_success: float | None = None
    step: int | None = None
    error: str | None = None
    restarts: int = 0
    notes: tuple[str, ...] = ()
