"""A third scheduler in one file: each job is a folder of $TOY_QUEUE, and a process that runs its task.

test_toy_scheduler.py copies this file to launcher/scheduler/toy.py. `python -m launcher.scheduler.toy JOB`
runs the job in that folder, again each time the task has asked for a requeue.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from gpt.run.records import Job
from launcher.process_tree import identity
from launcher.scheduler.local import LocalScheduler
from launcher.scheduler.protocol import JobRequest, JobState, NodeIdentity, Requeue, Standing, SubmittedJob

_RUN_TASK = "import cloudpickle, sys; cloudpickle.load(open(sys.argv[1], 'rb'))()"


class ToyScheduler(LocalScheduler):
    """Jobs of one node. What it does not define is as on the local machine."""

    kind = "toy"
    title = "the toy scheduler"
    runs_here = False
    is_attended = False
    can_requeue = True

    def submit(self, request: JobRequest, tasks: Sequence[Callable[[], Any]]) -> list[SubmittedJob]:
        return [self._start(request, task) for task in tasks]

    def _start(self, request: JobRequest, task: Callable[[], Any]) -> SubmittedJob:
        job = _queue() / f"job{len(list(_queue().iterdir())) + 1}"
        job.mkdir()
        (job / "task").write_bytes(cloudpickle.dumps(task))
        with (job / "log").open("wb") as log:
            runner = subprocess.Popen(
                [sys.executable, "-m", "launcher.scheduler.toy", str(job)],
                env={**os.environ, **request.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (job / "runner").write_text(identity(runner.pid) or "")
        (job / "runner-pid").write_text(str(runner.pid))
        return SubmittedJob(job.name)

    def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        return [_standing(_queue() / job.job_id) for job in jobs]

    def node_identity(self) -> NodeIdentity:
        job_id = os.environ["TOY_JOB"]
        return NodeIdentity(f"toy-{job_id}", int(os.environ["TOY_JOB_RUN"]), 0, 1, "toy-node", job_id)

    def requeue(
        self, identity: NodeIdentity, _newly_excluded: Sequence[str], _excluded: Sequence[str], _folder: Path
    ) -> Requeue:
        (_queue() / identity.job_id / "requeue").touch()
        return Requeue.AT_EXIT


def _queue() -> Path:
    return Path(os.environ["TOY_QUEUE"])


def _standing(job: Path) -> Standing:
    is_alive = identity(int((job / "runner-pid").read_text())) == (job / "runner").read_text()
    return Standing(JobState.RUNNING if is_alive else JobState.ENDED)


def run_job(job: Path) -> None:
    """Run the task of `job`, and again as long as it asks for a requeue."""
    job_run = 0
    while True:
        variables = {"TOY_JOB": job.name, "TOY_JOB_RUN": str(job_run)}
        task = subprocess.Popen(
            [sys.executable, "-c", _RUN_TASK, str(job / "task")], env={**os.environ, **variables}
        )
        (job / "task-pid").write_text(str(task.pid))
        task.wait()
        if not (job / "requeue").exists():
            return
        (job / "requeue").unlink()
        job_run += 1


SCHEDULER = ToyScheduler()

if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
