"""The jobs of a run: the newest one, how it stands, how it ended, and who may start the next.

Who asks does not disturb: the scheduler is asked seldom, and about all jobs at once.
"""

import fcntl
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, LaunchError
from gpt.checkpoint.format import committed
from gpt.run.run_dir import RunDir, read_json, write_json
from launcher.process_tree import identity
from launcher.runs.stop_request import is_persons, standing_stop
from launcher.scheduler import slurm
from launcher.scheduler.slurm import Standing

_PAUSE_S = {"local": 0.0, "slurm": 5.0}  # between questions: squeue is a shared service


@dataclass(frozen=True)
class Job:
    """One submission. `process` identifies a local job's controller beyond its reusable process id."""

    submission: int
    executor: str
    job_id: str
    host: str
    pid: int | None
    process: str | None
    run_inode: int
    submitted_at: float


@dataclass(frozen=True)
class Outcome:
    """How a job ended, as its node task wrote it: the exit code of commands, and the cause in words."""

    exit_code: int
    cause: str
    attempt: int | None
    is_cancelled: bool = False  # in the scheduler, by somebody


_JOB, _OUTCOME = TypeAdapter(Job), TypeAdapter(Outcome)
Written = TypeVar("Written")


def read_job(run: RunDir) -> Job | None:
    """The newest job of this very run directory; None before the first, and in a copy of a run.

    Raises ConfigError when job.json is not as it was written.
    """
    content = read_json(run.job)
    if content is None or is_copy(run):
        return None
    return _as_written(_JOB, content, run.job)


def is_copy(run: RunDir) -> bool:
    """Whether this run directory was copied from one that had a job, and has had none of its own yet."""
    content = read_json(run.job)
    return content is not None and content.get("run_inode") != run.path.stat().st_ino


def read_outcome(run: RunDir, job: Job) -> Outcome | None:
    """How `job` ended; None while it runs, or when its node was lost. Raises ConfigError as `read_job`."""
    path = outcome_path(submission_folder(run, job.submission))
    content = read_json(path)
    return _as_written(_OUTCOME, content, path) if content is not None else None


def _as_written(shape: TypeAdapter[Written], content: dict[str, Any], path: Path) -> Written:
    try:
        return shape.validate_python(content)
    except ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"{path} is not as this version of Outlast writes it ({wrong}). If the run's job is over, remove "
            "the file."
        ) from None


def state(run: RunDir, job: Job) -> str:
    """ "running", "pending", "ended", or "unknown" where nobody can say from here."""
    return standings([(run, job)])[run.path].word


def standings(jobs: Iterable[tuple[RunDir, Job]]) -> dict[Path, Standing]:
    """How each run's job stands, by run directory; Slurm is asked once for all of them.

    A job that has said how it ended is over: what its processes still do (the tracker may take a minute to
    send the rest of the record) stands in nobody's way.
    """
    found, questions = {}, {}
    for run, job in jobs:
        if read_outcome(run, job) is not None:
            found[run.path] = Standing("ended")
        elif job.executor == "local":
            found[run.path] = _local_standing(job)
        else:
            questions[run.path] = job.job_id
    answers = slurm.standings(questions.values())
    return found | {path: answers[job_id] for path, job_id in questions.items()}


def _local_standing(job: Job) -> Standing:
    if job.host != socket.gethostname():
        return Standing("unknown", reason=f"started on {job.host}")
    is_alive = job.process is not None and job.pid is not None and identity(job.pid) == job.process
    return Standing("running" if is_alive else "ended")


class Lookout:
    """How a job stands, each time it is asked for; the scheduler hears of it every few seconds only.

    With `serves_stop`, a job that waits in the queue (for the first time, or again) while a person's stop
    request stands is taken out of it: nobody else is there to see the request.
    """

    def __init__(self, run: RunDir, job: Job, *, serves_stop: bool) -> None:
        self._run, self._job, self._serves_stop = run, job, serves_stop
        self._word, self._next_question = "unknown", 0.0
        self._unknown_since: float | None = None
        self._is_cancelled = False

    @property
    def unknown_s(self) -> float:
        """For how long nobody has been able to say how the job stands."""
        return 0.0 if self._unknown_since is None else time.monotonic() - self._unknown_since

    def word(self) -> str:
        """ "running", "pending", "ended" or "unknown", a few seconds old at most. Raises LaunchError."""
        if time.monotonic() < self._next_question:
            return self._word
        self._word = state(self._run, self._job)
        if self._serves_stop and self._word == "pending" and is_persons(standing_stop(self._run)):
            slurm.cancel_waiting(self._job.job_id)
            self._is_cancelled = True
            self._word = state(self._run, self._job)
        if self._is_cancelled and self._word == "ended":
            _say_taken_out(self._run, self._job)
        if self._word != "unknown":
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = time.monotonic()
        self._next_question = time.monotonic() + _PAUSE_S[self._job.executor]
        return self._word


def _say_taken_out(run: RunDir, job: Job) -> None:
    """Write how a job ended that was cancelled while it waited, where it could not say so itself."""
    # A waiting job of an array is forgotten as soon as it is cancelled.
    if read_outcome(run, job) is not None or slurm.why_ended(job.job_id) not in ("CANCELLED", None):
        return
    saved = committed(run.checkpoints)
    what = f"step {saved[-1][0]} is saved" if saved else "it had not begun"
    write_json(
        outcome_path(submission_folder(run, job.submission)),
        asdict(Outcome(75, f"taken out of the queue; {what}", None)),
    )


def claim_start(run: RunDir) -> TextIO:
    """The right to start `run`, held until the file is closed. Raises LaunchError when it is taken."""
    claim = (run.path / ".starting").open("w")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise LaunchError(f"{run.path} is being started by another command at this moment.") from None
    except OSError:
        pass  # a file system without locks: the attempt's number fences what starts twice
    return claim


def refuse_while_alive(run: RunDir) -> None:
    """Raise LaunchError while the newest job of `run` lives, or may live for all that Slurm says.

    Of a local job of another machine nothing can be known here, and that machine may be gone for good (a
    container's name is new each time): the run is taken over with a warning, and the other job, if it does
    live, finds itself fenced.
    """
    job = read_job(run)
    if job is None:
        return
    word = state(run, job)
    if word in ("running", "pending"):
        raise LaunchError(
            f"{run.path} has a job already ({job.executor} {job.job_id} on {job.host}, {word}). "
            f"`outlast stop {run.path}` ends it; `outlast logs {run.path} --follow` shows it."
        )
    if word == "unknown" and job.executor == "slurm":
        raise LaunchError(
            f"whether Slurm job {job.job_id} of {run.path} has ended cannot be known here: squeue and "
            "scontrol do not answer. Try again once they do, or on a login node of that cluster; if you know "
            f"that the job is over, remove {run.job} first."
        )
    if word == "unknown":
        click.echo(
            f"warning: the run's last job was on {job.host}; if it still lives there, it ends now: this "
            "start takes the run over",
            err=True,
        )


def submission_folder(run: RunDir, number: int) -> Path:
    """Pickles, logs and outcome of submission `number`."""
    return run.submission / f"{number:04d}"


def outcome_path(folder: Path) -> Path:
    """Where the first node's task writes how the job ended."""
    return folder / "outcome.json"
