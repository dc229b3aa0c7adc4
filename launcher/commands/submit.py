"""ClusterConfig → submitit, and the job that comes of it: local and Slurm through one interface.

A child process (`python -m launcher.commands.submit RUN_DIR`) makes the submission. It has a session of its
own and imports the run's snapshot of the code. So whatever it starts is out of reach of the terminal's Ctrl-C
and hang-up, holds none of the caller's pipes open, and imports what was submitted.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import LaunchError
from gpt.run.events import Event, record_event
from gpt.run.records import Job
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.process_tree import identity
from launcher.runs.job_record import read_job
from launcher.runs.store import job_environment, python_module, read_cluster, read_config
from launcher.scheduler.bad_nodes import without_bad_nodes
from launcher.scheduler.container import needed_folders
from launcher.scheduler.sbatch import slurm_executor

_LOCAL_TIMEOUT_MIN = 60 * 24 * 365 * 10  # submitit's local default is 2 minutes


def submit(run: RunDir, reason: str) -> Job:
    """Start a job for `run` and return once its executor has taken it. Raises LaunchError.

    `reason` ("launch", "resume") goes into the event "submitted".
    """
    [job] = submit_together([run], reason, run)
    return job


def submit_together(
    runs: Sequence[RunDir], reason: str, home: RunDir, at_once: int | None = None
) -> list[Job]:
    """Start a job for each of `runs`, several as one array of Slurm, of which `at_once` run at a time.

    submitit's files lie in `home`, whose code they run: the run itself, or the folder of all. A stop request
    that stands is removed. Raises LaunchError.
    """
    for run in runs:
        run.stop.unlink(missing_ok=True)
        run.submission(run.last_submission() + 1).path.mkdir(parents=True)
    folder = home.submission(home.last_submission() + (0 if home == runs[0] else 1)).path
    folder.mkdir(parents=True, exist_ok=True)
    output = SubmissionDir(folder).controller_log
    arguments = [str(folder), reason, str(at_once or len(runs)), *(str(run.path) for run in runs)]
    with output.open("ab") as log:
        child = subprocess.run(
            python_module("launcher.commands.submit", *arguments),
            env=job_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    jobs = [job for run in runs if (job := read_job(run)) is not None]
    if child.returncode != 0 or len(jobs) != len(runs):
        raise LaunchError(f"the submission failed:\n{output.read_text(encoding='utf-8').rstrip()}")
    return jobs


@contextmanager
def outside_any_job() -> Iterator[None]:
    """The environment without the job that this command runs in, if it does: sbatch would inherit it.

    Where Slurm's configuration lies stays, and so do the SBATCH_ variables of somebody on a login node.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit import helpers

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with helpers.clean_env():
        os.environ.update(kept)
        yield


def main() -> None:
    """The child of `submit_together`: hand the node tasks to submitit and write each run's job.json."""
    from submitit import Executor, LocalExecutor
    from submitit.core.utils import FailedJobError

    from launcher.node.task import NodeTask

    folder, reason, at_once = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    runs = [RunDir(Path(path)) for path in sys.argv[4:]]
    cluster = read_cluster(runs[0])
    executor: Executor
    if cluster.kind == "local":
        executor = LocalExecutor(folder)
        executor.update_parameters(
            timeout_min=_LOCAL_TIMEOUT_MIN, gpus_per_node=cluster.gpus_per_node, tasks_per_node=1
        )
    else:
        mounts = [path for run in runs for path in needed_folders(run, read_config(run))]
        name = runs[0].path.name if len(runs) == 1 else runs[0].path.parent.name
        for run in runs:
            cluster = without_bad_nodes(run, cluster)
        ours = {variable: os.environ[variable] for variable in runs[0].code_environment}
        executor = slurm_executor(name, cluster, mounts, folder, ours, array_parallelism=at_once)
    tasks = [NodeTask(str(run.path), f"{run.last_submission():04d}") for run in runs]
    try:
        with outside_any_job(), executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        sys.exit(str(error))  # sbatch's own words
    for run, task, made in zip(runs, tasks, submitted, strict=True):
        pid = int(made.job_id) if cluster.kind == "local" else None
        job = Job(
            submission=int(task.submission),
            executor=cluster.kind,
            job_id=made.job_id,
            host=socket.gethostname(),
            pid=pid,
            process=identity(pid) if pid is not None else None,
            run_inode=run.path.stat().st_ino,
            submitted_at=time.time(),
        )
        job.write(run.job)
        record_event(
            run.events,
            Event.SUBMITTED,
            submission=job.submission,
            reason=reason,
            executor=job.executor,
            job_id=job.job_id,
            world_size=cluster.world_size,
        )


if __name__ == "__main__":
    main()
