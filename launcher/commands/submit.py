"""Hand runs to their scheduler. `python -m launcher.commands.submit` is the process that does it.

That child process has a session of its own and imports the run's snapshot of the code. So the jobs that it
starts are out of reach of the terminal's Ctrl-C and hang-up, hold none of the caller's pipes open, and run
the code that was submitted.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import LaunchError
from gpt.run.events import Event, record_event
from gpt.run.records import Job
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.commands.signal_guard import held_signals
from launcher.process_tree import identity
from launcher.runs.code_snapshot import job_environment, python_module
from launcher.runs.job_record import read_job
from launcher.runs.store import read_cluster, read_config
from launcher.scheduler.bad_nodes import bad_nodes
from launcher.scheduler.container import needed_folders
from launcher.scheduler.protocol import JobRequest
from launcher.scheduler.registry import scheduler_of


def submit(run: RunDir, reason: str) -> Job:
    """Start a job for `run` and return once the scheduler has accepted it. Raises LaunchError.

    `reason` ("launch", "resume", "sweep") is recorded in the event "submitted".
    """
    [job] = submit_together([run], reason, run)
    return job


def submit_together(
    runs: Sequence[RunDir], reason: str, home: RunDir, at_once: int | None = None
) -> list[Job]:
    """Start a job for each of `runs`, of which `at_once` may run at the same time.

    submitit's files and the code are in `home`: the run itself, or the sweep that the runs belong to. An old
    stop request is removed. Ctrl-C and SIGTERM wait until the jobs exist: a signal in between would leave
    jobs that nobody knows. Raises LaunchError.
    """
    for run in runs:
        run.stop.unlink(missing_ok=True)
        run.submission(run.last_submission() + 1).path.mkdir(parents=True)
    folder = home.submission(home.last_submission() + (0 if home == runs[0] else 1)).path
    folder.mkdir(parents=True, exist_ok=True)
    output = SubmissionDir(folder).controller_log
    arguments = [str(folder), reason, str(at_once or len(runs)), *(str(run.path) for run in runs)]
    with held_signals(), output.open("ab") as log:
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


def main() -> None:
    """The child of `submit_together`: submit the node tasks and write each run's job.json."""
    from launcher.node.task import NodeTask

    folder, reason, at_once = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    runs = [RunDir(Path(path)) for path in sys.argv[4:]]
    cluster = read_cluster(runs[0])
    request = JobRequest(
        name=runs[0].path.name if len(runs) == 1 else runs[0].path.parent.name,
        cluster=cluster,
        folder=folder,
        environment={name: os.environ[name] for name in runs[0].code_environment},
        mounts=[path for run in runs for path in needed_folders(run, read_config(run))],
        excluded_nodes=list(dict.fromkeys(node for run in runs for node in bad_nodes(run))),
        at_once=at_once,
    )
    tasks = [NodeTask(str(run.path), f"{run.last_submission():04d}") for run in runs]
    try:
        submitted = scheduler_of(cluster.kind).submit(request, tasks)
    except LaunchError as error:
        sys.exit(str(error))
    for run, task, made in zip(runs, tasks, submitted, strict=True):
        job = Job(
            submission=int(task.submission),
            executor=cluster.kind,
            job_id=made.job_id,
            host=socket.gethostname(),
            pid=made.pid,
            process=identity(made.pid) if made.pid is not None else None,
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
