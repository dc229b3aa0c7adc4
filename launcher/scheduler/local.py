"""Jobs on this machine, as background processes: submitit's local executor without a queue."""

# ruff: noqa: ARG002 - the interface passes what any scheduler may need

import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import LaunchError
from gpt.config.run import RunConfig
from gpt.run.environment import Variable
from gpt.run.host_memory import available_bytes
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.process_tree import identity
from launcher.scheduler.outside_job import outside_any_job
from launcher.scheduler.protocol import (
    JobRequest,
    JobState,
    NodeIdentity,
    Requeue,
    Scheduler,
    Standing,
    SubmittedJob,
)

if TYPE_CHECKING:
    from submitit import Job as SubmititJob

_TIMEOUT_MIN = 60 * 24 * 365 * 10  # submitit's local default is 2 minutes


class LocalScheduler(Scheduler):
    """Starts each job at once. A job is identified by its first process."""

    kind = "local"
    title = "this machine"
    runs_here = True
    is_attended = True
    can_requeue = False
    poll_s = 0.0
    result_delay_s = 0.0
    own_fields = ()

    def __init__(self) -> None:
        self._started: dict[int, SubmititJob[Any]] = {}  # by process id, as far as this process started them

    def cluster_problems(self, cluster: ClusterConfig) -> list[str]:
        """A local cluster is one machine."""
        if cluster.nodes > 1:
            return [f"nodes = {cluster.nodes}: kind = 'local' is one machine; use nodes = 1."]
        return []

    def check_machine(self, cluster: ClusterConfig, findings: Findings) -> bool:
        """Check that the GPUs are here, and warn when processes share CPU cores."""
        _check_interface(cluster, findings)
        if cluster.gpus_per_node:
            present = len(list(Path("/dev").glob("nvidia[0-9]*")))
            if present < cluster.gpus_per_node:
                findings.problem(
                    f"gpus_per_node = {cluster.gpus_per_node}, but this machine has {present} NVIDIA GPUs."
                )
            return False
        cores = len(os.sched_getaffinity(0))
        if cluster.processes > cores:
            findings.warn(f"{cluster.processes} processes share {cores} CPU cores: it will be slow.")
        return False

    def check_site(
        self,
        run: RunDir,
        config: RunConfig,
        cluster: ClusterConfig,
        checkpoint_bytes: int,
        findings: Findings,
    ) -> None:
        """There is no site to ask."""

    def node_memory(self, cluster: ClusterConfig) -> tuple[int, str] | None:
        """The memory that is free on this machine."""
        return available_bytes(), "free on this machine"

    def submission_text(self, run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str | None:
        """None: no file is handed over."""
        return None

    def submit(self, request: JobRequest, tasks: Sequence[Callable[[], Any]]) -> list[SubmittedJob]:
        """Start the jobs, all at the same time."""
        from submitit import LocalExecutor

        executor = LocalExecutor(request.folder)
        executor.update_parameters(
            timeout_min=_TIMEOUT_MIN, gpus_per_node=request.cluster.gpus_per_node, tasks_per_node=1
        )
        with outside_any_job(), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        self._started |= {int(job.job_id): job for job in jobs}
        return [SubmittedJob(job.job_id, pid=int(job.job_id)) for job in jobs]

    def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        """Look at the first process of each job; the jobs of other machines are unknown."""
        return [self._standing(job) for job in jobs]

    def why_ended(self, job_id: str) -> str | None:
        """None: nothing remembers a process that has ended."""
        return None

    def end_states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Empty, for the same reason."""
        return {}

    def unknown_job_problem(self, run: RunDir, job: Job) -> str | None:
        """None: the other machine may be gone for good, and a job that does live there finds itself fenced.

        The name of a container is new each time, for example.
        """
        return None

    def cancel(self, job: SubmittedJob) -> None:
        """Interrupt the job's first process."""
        if job.pid is not None and job.pid in self._started:
            self._started[job.pid].cancel(check=False)

    def ask_to_stop(self, job: Job, *, now: bool) -> str:
        """SIGTERM to the job's first process, which passes it on; SIGKILL ends all its processes."""
        if self._standing(job).state != JobState.RUNNING or job.pid is None:
            raise LaunchError(f"the local job {job.job_id} on {job.host} cannot be signalled from here")
        number = signal.SIGKILL if now else signal.SIGTERM
        try:
            os.kill(job.pid, number)
        except ProcessLookupError:
            return "the job has just ended"
        except PermissionError:
            raise LaunchError(f"process {job.pid} of the job belongs to another user") from None
        return f"process {job.pid} of the job got {number.name}"

    def cancel_pending(self, job_id: str) -> None:
        """Do nothing: no job waits here."""

    def interrupt(self, job_id: str) -> None:
        """Refuse: there is no queue."""
        raise LaunchError("a local job cannot be put back in a queue")

    def start_now(self, job_id: str) -> None:
        """Do nothing: a job starts at once."""

    def node_identity(self) -> NodeIdentity:
        """The only node."""
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        return NodeIdentity(f"{self.kind}-{job_id}", 0, 0, 1, socket.gethostname(), job_id)

    def parent_of_task(self) -> int | None:
        """submitit's controller, whose process id is the job's."""
        job_id = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
        return int(job_id) if job_id is not None else None

    def node_address(self, identity: NodeIdentity) -> str:
        """No other node has to reach this one."""
        return "127.0.0.1"

    def core_count(self, inherited: Mapping[str, str]) -> int:
        """The cores on which this process may run."""
        return len(os.sched_getaffinity(0))

    def visible_gpus(self, cluster: ClusterConfig, inherited: Mapping[str, str]) -> str | None:
        """The first of the GPUs that the caller may use; submitit would number them from 0."""
        allowed = inherited.get(Variable.CUDA_VISIBLE_DEVICES)
        return ",".join(allowed.split(",")[: cluster.gpus_per_node]) if allowed else None

    def owns_nodes(self, identity: NodeIdentity) -> bool:
        """True: nobody takes this machine away."""
        return True

    def was_requeued(self, identity: NodeIdentity) -> bool:
        """False: there is no queue."""
        return False

    def requeue(
        self, identity: NodeIdentity, newly_excluded: Sequence[str], excluded: Sequence[str], folder: Path
    ) -> Requeue:
        """Refuse: there is no queue."""
        raise LaunchError("a local job cannot be put back in a queue")

    def _standing(self, job: Job) -> Standing:
        if job.host != socket.gethostname():
            return Standing(JobState.UNKNOWN, reason=f"started on {job.host}")
        if job.pid in self._started:
            is_alive = not self._started[job.pid].done()  # reaps the process, too
        else:
            is_alive = job.process is not None and job.pid is not None and identity(job.pid) == job.process
        return Standing(JobState.RUNNING if is_alive else JobState.ENDED)


def _check_interface(cluster: ClusterConfig, findings: Findings) -> None:
    """Find names in `interface` that no network interface here has; gloo compares whole names."""
    present = [name for _, name in socket.if_nameindex()]
    missing = [name for name in (cluster.interface or "").split(",") if name and name not in present]
    if missing:
        findings.problem(
            f"interface = {cluster.interface!r}: this machine has no network interface {missing[0]!r}. "
            f"It has: {', '.join(present)}. On one machine, the field can be left out."
        )


SCHEDULER = LocalScheduler()
