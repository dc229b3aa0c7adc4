"""Every path in a run directory. No other module spells these names.

A run directory never stores its own path, so it can be moved or copied.
"""

from dataclasses import dataclass
from pathlib import Path

from gpt.run.json_file import read_json

# Prefixes in checkpoints/ of folders that do not count as checkpoints.
UNCOMMITTED_PREFIX = ".tmp-"  # being written, fetched or deleted; removed at the next start
CORRUPT_PREFIX = ".bad-"  # failed verification; kept until the user deletes it
REWOUND_PREFIX = ".before-"  # later than the step that a resume went back to; kept likewise

NODE_PREFIX = "node-"  # of a node's folder of logs, and of its torchrun's log


@dataclass(frozen=True)
class AttemptDir:
    """RUN/attempts/NNNN: one generation of workers."""

    path: Path

    @property
    def owner(self) -> Path:
        """Which job run made the attempt."""
        return self.path / "OWNER.json"

    @property
    def result(self) -> Path:
        """How the attempt ended."""
        return self.path / "result.json"

    def node(self, node: int | str) -> Path:
        """The logs of one node's workers; the node "*" makes a glob pattern for all of them."""
        return self.path / f"{NODE_PREFIX}{node}"

    def rank_log(self, node: int, rank: int) -> Path:
        """The output of one worker."""
        return self.node(node) / f"rank-{rank:05d}.log"

    def hang_report(self, node: int) -> Path:
        """What a node's workers were doing when a rank hung."""
        return self.path / f"hang-node-{node}.json"


@dataclass(frozen=True)
class SubmissionDir:
    """RUN/submission/NNNN: one submission, with the files of its job's node tasks."""

    path: Path

    @property
    def number(self) -> int:
        """The number of the submission, from 1."""
        return int(self.path.name)

    @property
    def outcome(self) -> Path:
        """How the job ended."""
        return self.path / "outcome.json"

    @property
    def controller_log(self) -> Path:
        """The output of the process that submitted the job, and of a local job's controller."""
        return self.path / "controller.log"

    @property
    def tracking_log(self) -> Path:
        """The output of the MLflow sidecar."""
        return self.path / "tracking.log"

    @property
    def mirroring_log(self) -> Path:
        """The output of the sidecar that mirrors checkpoints."""
        return self.path / "mirroring.log"

    def node_log(self, node: int | str) -> Path:
        """The output of one node's torchrun; the node "*" makes a glob pattern for all of them."""
        return self.path / f"{NODE_PREFIX}{node}.log"

    def torchrun_logs(self, job_run: int, node: int) -> Path:
        """torchrun's own folder."""
        return self.path / "torchrun" / f"{job_run}-{node}"

    def meeting_point(self, job: str, job_run: int) -> Path:
        """Where the nodes of a job run find the first one."""
        return self.path / f"meeting-{job}-{job_run}.json"

    def node_failure(self, job: str, job_run: int, node: int | str) -> Path:
        """Why one node of a job run failed; the node "*" makes a glob pattern for all of them."""
        return self.path / f"failure-{job}-{job_run}-{node}.json"


@dataclass(frozen=True)
class RunDir:
    """The layout of one run on disk."""

    path: Path

    @property
    def config(self) -> Path:
        """The fully resolved run config: the one file that workers trust."""
        return self.path / "config.json"

    @property
    def cluster(self) -> Path:
        """The cluster config, so that a bare resume knows where to run."""
        return self.path / "cluster.json"

    @property
    def provenance(self) -> Path:
        """Command line, versions, git commit, host, data fingerprint, MLflow run id."""
        return self.path / "provenance.json"

    @property
    def encoding(self) -> Path:
        """A copy of the data's tokenizer, so that the run can be sampled and exported without the data."""
        return self.path / "encoding.json"

    @property
    def code(self) -> Path:
        """The packages as they were at submission; workers import from here."""
        return self.path / "code"

    @property
    def code_being_copied(self) -> Path:
        """The next `code`, until it is whole; a command that was killed may leave one."""
        return self.path / ".code.new"

    @property
    def code_environment(self) -> dict[str, str]:
        """The variables with which a Python imports `code`."""
        # Without the second one `-m` would find a checkout in the current folder first.
        return {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}

    @property
    def sweep(self) -> Path:
        """SWEEP_DIR/sweep.json: the runs of a sweep, in the order of its grid."""
        return self.path / "sweep.json"

    @property
    def job(self) -> Path:
        """The newest submission: executor, job id, host, process id, time."""
        return self.path / "job.json"

    @property
    def starting(self) -> Path:
        """The lock that a command holds while it starts the run."""
        return self.path / ".starting"

    @property
    def submissions(self) -> Path:
        """One numbered folder for each submission; submitit keeps its pickles and logs there."""
        return self.path / "submission"

    @property
    def attempts(self) -> Path:
        """One numbered folder for each generation of workers."""
        return self.path / "attempts"

    @property
    def profiles(self) -> Path:
        """Traces of torch's profiler, if the config asks for them."""
        return self.path / "profile"

    @property
    def stop(self) -> Path:
        """A stop request, until it is served."""
        return self.path / "stop"

    @property
    def metrics(self) -> Path:
        """The record: one line a step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, phases, stops, saves, failures."""
        return self.path / "events.jsonl"

    @property
    def bad_nodes(self) -> Path:
        """Nodes that failed their check or their run, one line each."""
        return self.path / "bad_nodes.jsonl"

    @property
    def tracking(self) -> Path:
        """How much of the record MLflow has received."""
        return self.path / "tracking.json"

    @property
    def mlflow_database(self) -> Path:
        """Where MLflow keeps its runs by default: one SQLite file for all the runs in a folder."""
        return mlflow_database_in(self.path.resolve().parent)

    def sidecar_health(self, sidecar: str) -> Path:
        """What a sidecar has achieved, and what keeps it from more."""
        return self.path / f"sidecar-{sidecar}.json"

    @property
    def checkpoints(self) -> Path:
        """`step-NNNNNNNN` folders; names with a leading dot are not checkpoints."""
        return self.path / "checkpoints"

    def attempt(self, number: int) -> AttemptDir:
        """The folder of attempt `number`."""
        return AttemptDir(self.attempts / f"{number:04d}")

    def attempt_numbers(self) -> list[int]:
        """The attempts so far, oldest first."""
        return _numbers(self.attempts)

    def submission(self, number: int) -> SubmissionDir:
        """The folder of submission `number`."""
        return SubmissionDir(self.submissions / f"{number:04d}")

    def last_submission(self) -> int:
        """The number of the newest submission, 0 before the first."""
        return max(_numbers(self.submissions), default=0)


def mlflow_database_in(folder: Path) -> Path:
    """Where MLflow keeps the runs in `folder` by default.

    The runs of a sweep are kept with those beside the sweep, unless an earlier version has kept them apart.
    """
    own = folder / "mlflow.db"
    is_sweep = RunDir(folder).sweep.exists()
    return folder.resolve().parent / own.name if is_sweep and not own.exists() else own


def mlflow_artifacts_beside(database: Path) -> Path:
    """Where MLflow keeps the files of the runs in an SQLite `database`: they move with it."""
    return database.parent / "mlflow-artifacts"


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def is_exported(folder: Path) -> bool:
    """Whether `folder` is an export, or any folder that transformers loads, rather than a run directory."""
    return "model_type" in (read_json(folder / "config.json") or {})
