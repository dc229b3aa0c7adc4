"""Jobs in Slurm: submitit hands them to sbatch, and Slurm's commands answer everything else."""

# ruff: noqa: ARG002 - the interface passes what any scheduler may need

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import LaunchError
from gpt.config.run import RunConfig
from gpt.run.json_file import retry_on_oserror
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.scheduler import slurm_commands
from launcher.scheduler.outside_job import outside_any_job
from launcher.scheduler.protocol import (
    JobRequest,
    NodeIdentity,
    Requeue,
    Scheduler,
    Standing,
    SubmittedJob,
)
from launcher.scheduler.sbatch import (
    SLURM_FIELDS,
    option_problems,
    requeue_mark,
    slurm_executor,
    submission_text,
)
from launcher.scheduler.slurm_site import check_slurm_site


class SlurmScheduler(Scheduler):
    """Queues jobs of several nodes, several jobs as one array, and requeues them itself.

    Slurm requeues only the jobs that it had to kill.
    """

    kind = "slurm"
    title = "Slurm"
    runs_here = False
    is_attended = False
    can_requeue = True
    poll_s = 5.0
    result_delay_s = 30.0
    own_fields = SLURM_FIELDS

    def cluster_problems(self, cluster: ClusterConfig) -> list[str]:
        """Options in [sbatch] that another field or the launcher itself decides."""
        return option_problems(cluster)

    def check_machine(self, cluster: ClusterConfig, findings: Findings) -> bool:
        """Check that Slurm's commands are here."""
        missing = [command for command in ("sbatch", "srun", "scontrol") if shutil.which(command) is None]
        if missing:
            findings.problem(
                f"kind = 'slurm', but there is no {missing[0]} here. Launch from a login node of the cluster."
            )
        return not missing

    def check_site(
        self,
        run: RunDir,
        config: RunConfig,
        cluster: ClusterConfig,
        checkpoint_bytes: int,
        findings: Findings,
    ) -> None:
        """Check whether Slurm accepts the job, requeues it after a preemption, and leaves time to save."""
        check_slurm_site(run, config, cluster, checkpoint_bytes, findings)

    def node_memory(self, cluster: ClusterConfig) -> tuple[int, str] | None:
        """The memory that the cluster file asks for."""
        given = memory_bytes(cluster.mem)
        return (given, f"mem = {cluster.mem}") if given is not None else None

    def submission_text(self, run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str | None:
        """The batch script."""
        return submission_text(run, config, cluster)

    def submit(self, request: JobRequest, tasks: Sequence[Callable[[], Any]]) -> list[SubmittedJob]:
        """Submit the jobs, several as one array."""
        from submitit.core.utils import FailedJobError

        cluster = request.cluster.excluding(request.excluded_nodes)
        executor = slurm_executor(
            request.name,
            cluster,
            request.mounts,
            request.folder,
            request.environment,
            array_parallelism=request.at_once,
        )
        try:
            with outside_any_job(), executor.batch():
                jobs = [executor.submit(task) for task in tasks]
        except FailedJobError as error:
            raise LaunchError(str(error)) from error  # sbatch's own message
        return [SubmittedJob(job.job_id) for job in jobs]

    def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        """Ask squeue about all the jobs at once."""
        found = slurm_commands.standings(job.job_id for job in jobs)
        return [found[job.job_id] for job in jobs]

    def why_ended(self, job_id: str) -> str | None:
        """Slurm's state of the job: CANCELLED, TIMEOUT, NODE_FAIL…"""
        return slurm_commands.why_ended(job_id)

    def end_states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The states that the accounting remembers, where there is one."""
        return slurm_commands.accounted_states(job_ids)

    def unknown_job_problem(self, run: RunDir, job: Job) -> str | None:
        """The job may be running, so the run must wait until Slurm answers."""
        return (
            f"it is unknown whether Slurm job {job.job_id} of {run.path} has ended: squeue and scontrol do "
            "not answer here. Try again once they do, or on a login node of that cluster. If you know that "
            f"the job is over, remove {run.job} first."
        )

    def cancel(self, job: SubmittedJob) -> None:
        """scancel, without asking whether it worked."""
        slurm_commands.cancel(job.job_id)

    def ask_to_stop(self, job: Job, *, now: bool) -> str:
        """scancel, whose SIGTERM is a stop request; Slurm kills what is left after its KillWait."""
        slurm_commands.require_cancel(job.job_id)
        return f"scancel ends job {job.job_id}" + ("" if now else ", which has Slurm's KillWait to save")

    def cancel_pending(self, job_id: str) -> None:
        """Remove a pending job from the queue."""
        slurm_commands.cancel_pending(job_id)

    def interrupt(self, job_id: str) -> None:
        """Requeue the job from outside."""
        slurm_commands.requeue(job_id, slurm_commands.restarts(job_id))

    def start_now(self, job_id: str) -> None:
        """End Slurm's two minutes of delay before a requeued job starts."""
        slurm_commands.start_now(job_id)

    def node_identity(self) -> NodeIdentity:
        """From the environment of the job step. A task of an array is ARRAY_TASK, as scontrol needs it."""
        try:
            node, nodes, job_id, name = (
                os.environ[key] for key in ("SLURM_NODEID", "SLURM_NNODES", "SLURM_JOB_ID", "SLURMD_NODENAME")
            )
        except KeyError as error:
            raise LaunchError(f"not inside a Slurm job: {error} is not set") from None
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        if array is not None and task is not None:
            job_id = f"{array}_{task}"
        job_run = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return NodeIdentity(f"{self.kind}-{job_id}", job_run, int(node), int(nodes), name, job_id)

    def parent_of_task(self) -> int | None:
        """None: slurmstepd ends a step completely, and a container may hide it."""
        return None

    def node_address(self, identity: NodeIdentity) -> str:
        """The address of the name that Slurm gives this node, or of the route to another node."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        # Read from the environment, without asking Slurm: a container may not have scontrol.
        names = SlurmJobEnvironment().hostnames
        return slurm_commands.node_address(identity.name, [name for name in names if name != identity.name])

    def core_count(self, inherited: Mapping[str, str]) -> int:
        """The cores that Slurm allocated; not every site binds a job to them."""
        cores = len(os.sched_getaffinity(0))
        return min(cores, int(inherited.get("SLURM_CPUS_ON_NODE", cores)))

    def visible_gpus(self, cluster: ClusterConfig, inherited: Mapping[str, str]) -> str | None:
        """None: Slurm has set CUDA_VISIBLE_DEVICES itself."""
        return None

    def owns_nodes(self, identity: NodeIdentity) -> bool:
        """Ask scontrol; a container without it leaves the question to the batch script."""
        return not slurm_commands.is_here() or slurm_commands.is_wanted(identity.job_id, identity.job_run)

    def was_requeued(self, identity: NodeIdentity) -> bool:
        """Slurm counts a restart as soon as it is asked for one, while the job still ends."""
        return slurm_commands.restarts(identity.job_id) > identity.job_run

    def requeue(
        self, identity: NodeIdentity, newly_excluded: Sequence[str], excluded: Sequence[str], folder: Path
    ) -> Requeue:
        """`scontrol requeue`; in a container without it the batch script does that, after a file here."""
        if not slurm_commands.is_here():
            mark = requeue_mark(folder, identity.job_id, identity.job_run)
            retry_on_oserror(lambda: mark.write_text(",".join(excluded)))
            return Requeue.AT_EXIT
        is_requeued = slurm_commands.requeue(identity.job_id, identity.job_run, newly_excluded)
        return Requeue.ACCEPTED if is_requeued else Requeue.NOT_RUNNING


def memory_bytes(mem: str | None) -> int | None:
    """Bytes of a memory size as Slurm writes it, in MiB without a unit; None for 0, which means all of it."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", mem or "", re.IGNORECASE)
    if found is None or not int(found[1]):
        return None
    return int(found[1]) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[found[2].upper()]


SCHEDULER = SlurmScheduler()
