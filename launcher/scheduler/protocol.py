"""What Outlast needs of a scheduler: one interface, implemented by local.py and slurm.py.

A new scheduler is one module here with a `SCHEDULER` object, and one line in `launcher.cluster.SCHEDULERS`.
Nothing outside this package asks which scheduler it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Protocol

from gpt.config.run import RunConfig
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.findings import Findings

CANCELLED = "CANCELLED"  # `scheduler_state` of a job that someone cancelled, in every scheduler


class JobState(StrEnum):
    """The state of a job, as far as it matters to Outlast."""

    RUNNING = "running"
    PENDING = "pending"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the scheduler does not answer, or does not know this job from here


@dataclass(frozen=True)
class Standing:
    """A job's state, the scheduler's own name for it, and its nodes or the reason for the state."""

    state: JobState
    scheduler_state: str = ""
    reason: str = ""


@dataclass(frozen=True)
class NodeIdentity:
    """One node of one job run. `name` is what the scheduler calls the machine, `job_id` the job."""

    job: str  # unique among all schedulers: the scheduler's kind and the job's id
    job_run: int
    node: int
    nodes: int
    name: str
    job_id: str

    @property
    def is_first(self) -> bool:
        """Whether this is the first node, whose task decides for the whole job."""
        return self.node == 0


@dataclass(frozen=True)
class JobRequest:
    """What jobs are to get. submitit's files for them are in `folder`.

    `environment` must reach the tasks, `mounts` are the folders that a container must see, and `at_once` is
    how many of several jobs may run at the same time.
    """

    name: str
    cluster: ClusterConfig
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[Path] = ()
    excluded_nodes: Sequence[str] = ()
    at_once: int = 1


@dataclass(frozen=True)
class SubmittedJob:
    """A job that the scheduler has accepted. `pid` is its first process when that is on this machine."""

    job_id: str
    pid: int | None = None


class Requeue(Enum):
    """What became of the request to put a running job back in the queue."""

    ACCEPTED = "the scheduler ends this process soon"
    AT_EXIT = "the scheduler requeues the job after this process has ended"
    NOT_RUNNING = "this job run had already lost its nodes"


class Scheduler(Protocol):
    """Runs jobs on machines. The methods raise LaunchError when the scheduler refuses."""

    kind: str  # `kind` in cluster files, `executor` in job.json
    title: str  # what messages call it
    runs_here: bool  # jobs are processes of this machine and share it
    is_attended: bool  # launch and resume stay until the job has ended, unless the user says otherwise
    can_requeue: bool  # a running job can be put back in the queue
    poll_s: float  # how often a command may ask about jobs; the scheduler may be a shared service
    result_delay_s: float  # how long a finished job's files may take until this machine sees them
    own_fields: tuple[str, ...]  # fields of the cluster file that only this scheduler reads

    # Before a job

    def cluster_problems(self, cluster: ClusterConfig) -> list[str]:
        """What is wrong with a cluster file, by this scheduler's own rules."""
        ...

    def check_machine(self, cluster: ClusterConfig, findings: Findings) -> bool:
        """Check what this machine must have; True when `check_site` can ask further."""
        ...

    def check_site(
        self,
        run: RunDir,
        config: RunConfig,
        cluster: ClusterConfig,
        checkpoint_bytes: int,
        findings: Findings,
    ) -> None:
        """Check whether the site would accept, start and finish the job."""
        ...

    def node_memory(self, cluster: ClusterConfig) -> tuple[int, str] | None:
        """Host memory of one node in bytes, and where that number comes from; None when it is unknown."""
        ...

    def submission_text(self, run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str | None:
        """The file that the first submission of `run` would hand over, or None. Writes nothing."""
        ...

    # Jobs, from any machine

    def submit(self, request: JobRequest, tasks: Sequence[Callable[[], Any]]) -> list[SubmittedJob]:
        """Submit one job for each task, several of them together when the scheduler can.

        A job calls its task once on each of its nodes.
        """
        ...

    def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        """The standing of each job, from as few questions as possible."""
        ...

    def why_ended(self, job_id: str) -> str | None:
        """The scheduler's name for how a job ended, while it remembers the job."""
        ...

    def end_states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The same for several jobs that `standings` could only call ended, as far as it is remembered."""
        ...

    def unknown_job_problem(self, run: RunDir, job: Job) -> str | None:
        """Why `run` may not start again while its job's state is unknown; None when it may."""
        ...

    def cancel(self, job: SubmittedJob) -> None:
        """End a job that this process submitted, whatever its state."""
        ...

    def ask_to_stop(self, job: Job, *, now: bool) -> str:
        """Ask a job to save and stop (`now`: end it) without the run directory; a sentence about how."""
        ...

    def cancel_pending(self, job_id: str) -> None:
        """Remove a pending job from the queue."""
        ...

    def interrupt(self, job_id: str) -> None:
        """Put a running job back in the queue without a warning to it, as a preemption would."""
        ...

    def start_now(self, job_id: str) -> None:
        """End the delay before a requeued job starts again, if the scheduler has one."""
        ...

    # On a node of the job

    def node_identity(self) -> NodeIdentity:
        """Who this node task is. Raises LaunchError outside a job."""
        ...

    def parent_of_task(self) -> int | None:
        """The process that started this node task and ends with the job, where its id is known."""
        ...

    def node_address(self, identity: NodeIdentity) -> str:
        """The IP address at which the other nodes of the job reach this one."""
        ...

    def core_count(self, inherited: Mapping[str, str]) -> int:
        """The CPU cores of this node that the job may use; `inherited` is the node task's environment."""
        ...

    def visible_gpus(self, cluster: ClusterConfig, inherited: Mapping[str, str]) -> str | None:
        """CUDA_VISIBLE_DEVICES for the workers; None leaves it as it is."""
        ...

    def owns_nodes(self, identity: NodeIdentity) -> bool:
        """Whether this job run still has its nodes; waits for a scheduler that does not answer."""
        ...

    def was_requeued(self, identity: NodeIdentity) -> bool:
        """Whether someone has put the job back in the queue during this job run."""
        ...

    def requeue(
        self, identity: NodeIdentity, newly_excluded: Sequence[str], excluded: Sequence[str], folder: Path
    ) -> Requeue:
        """Put this node's running job back in the queue, away from the nodes `excluded`.

        `newly_excluded` are those that this job run has found; `folder` holds submitit's files.
        """
        ...
