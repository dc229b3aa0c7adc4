"""The newest job of a run: its state, how it ended, and whether a run may start another.

Commands ask a scheduler rarely, and about all jobs at once, because it may be a shared service.
"""

import fcntl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import click

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import committed
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import SCHEDULERS
from launcher.runs.job_record import read_job, read_outcome
from launcher.runs.stop_request import is_persons, pending_stop, request_stop
from launcher.scheduler.protocol import CANCELLED, JobState, Standing
from launcher.scheduler.registry import scheduler_of


def job_state(run: RunDir, job: Job) -> JobState:
    """The state of one job."""
    return standings([(run, job)])[run.path].state


def standings(jobs: Iterable[tuple[RunDir, Job]], *, with_end_states: bool = False) -> dict[Path, Standing]:
    """The standing of each run's job, by run directory. Each scheduler is asked once about all its jobs.

    A job whose outcome is written has ended, even while its processes still send the rest of the record to
    the tracker: they do not get in the way of another job. `with_end_states` also asks how the jobs ended
    that the scheduler has forgotten.
    """
    found: dict[Path, Standing] = {}
    unanswered: dict[str, list[tuple[RunDir, Job]]] = {}
    for run, job in jobs:
        if read_outcome(run, job) is not None:
            found[run.path] = Standing(JobState.ENDED)
        elif job.executor not in SCHEDULERS:
            reason = f"this version has no scheduler {job.executor!r}"
            found[run.path] = Standing(JobState.UNKNOWN, reason=reason)
        else:
            unanswered.setdefault(job.executor, []).append((run, job))
    for kind, pairs in unanswered.items():
        scheduler = scheduler_of(kind)
        answers = scheduler.standings([job for _, job in pairs])
        found |= {run.path: answer for (run, _), answer in zip(pairs, answers, strict=True)}
        if with_end_states:
            forgotten = [(run, job) for run, job in pairs if found[run.path] == Standing(JobState.ENDED)]
            states = scheduler.end_states([job.job_id for _, job in forgotten])
            found |= {
                run.path: Standing(JobState.ENDED, states.get(job.job_id, "")) for run, job in forgotten
            }
    return found


class JobWatcher:
    """The state of a job, however often it is read; the scheduler is asked every few seconds only.

    With `serves_stop`, a pending job (new or requeued) is removed from the queue once a person has asked the
    run to stop: no process is there to see the request.
    """

    def __init__(self, run: RunDir, job: Job, *, serves_stop: bool) -> None:
        self._run, self._job, self._serves_stop = run, job, serves_stop
        self._scheduler = scheduler_of(job.executor)
        self._state, self._next_question = JobState.UNKNOWN, 0.0
        self._unknown_since: float | None = None
        self._is_cancelled = False

    @property
    def unknown_s(self) -> float:
        """For how long the state has been unknown."""
        return 0.0 if self._unknown_since is None else time.monotonic() - self._unknown_since

    def state(self) -> JobState:
        """The state, at most a few seconds old. Raises LaunchError."""
        if time.monotonic() < self._next_question:
            return self._state
        self._state = job_state(self._run, self._job)
        if self._serves_stop and self._state == JobState.PENDING and is_persons(pending_stop(self._run)):
            self._scheduler.cancel_pending(self._job.job_id)
            self._is_cancelled = True
            self._state = job_state(self._run, self._job)
        if self._is_cancelled and self._state == JobState.ENDED:
            self._record_cancelled()
        if self._state != JobState.UNKNOWN:
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = time.monotonic()
        self._next_question = time.monotonic() + self._scheduler.poll_s
        return self._state

    def _record_cancelled(self) -> None:
        """Write the outcome of a job that was cancelled while pending and could not write it itself."""
        if read_outcome(self._run, self._job) is not None:
            return
        # Slurm forgets a pending job of an array as soon as it is cancelled.
        if self._scheduler.why_ended(self._job.job_id) not in (CANCELLED, None):
            return
        saved = committed(self._run.checkpoints)
        progress = f"step {saved[-1][0]} is saved" if saved else "it had not started"
        cause = f"removed from the queue; {progress}"
        outcome = JobOutcome(exit_code=ExitCode.STOPPED, cause=cause, attempt=None)
        outcome.write(self._run.submission(self._job.submission).outcome)


def ask_to_stop(run: RunDir, reason: str, note: Callable[[str], None], *, now: bool = False) -> None:
    """Ask the job of `run` to save and stop (`now`: to stop without saving).

    Where the request cannot be written, because the disk is full for example, the scheduler asks the job; a
    sentence about it goes to `note`. Raises LaunchError when neither works.
    """
    try:
        request_stop(run, reason, now=now)
    except OSError as error:
        job = read_job(run)
        if job is None:
            raise LaunchError(f"the stop request cannot be written: {error}") from None
        how = scheduler_of(job.executor).ask_to_stop(job, now=now)
        note(f"the stop request cannot be written ({error}); {how}")


def claim_start(run: RunDir) -> TextIO:
    """The right to start `run`, until the file is closed. Raises LaunchError if another command has it."""
    claim = run.starting.open("w")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise LaunchError(f"{run.path} is being started by another command at this moment.") from None
    except OSError:
        pass  # the file system has no locks; the attempt's number still fences a run that starts twice
    return claim


def refuse_while_alive(run: RunDir) -> None:
    """Raise LaunchError while the newest job of `run` is alive, or may be.

    If its state is unknown, the scheduler decides: the run waits, or this start takes it over with a warning.
    """
    job = read_job(run)
    if job is None:
        return
    state = job_state(run, job)
    if state in (JobState.RUNNING, JobState.PENDING):
        raise LaunchError(
            f"{run.path} already has a job ({job.executor} {job.job_id} on {job.host}, {state}). "
            f"`outlast stop {run.path}` ends it; `outlast logs {run.path} --follow` shows it."
        )
    if state == JobState.ENDED:
        return
    problem = scheduler_of(job.executor).unknown_job_problem(run, job)
    if problem is not None:
        raise LaunchError(problem)
    click.echo(
        f"warning: the run's last job was on {job.host}. If it is still alive there, it ends now, because "
        "this start takes the run over.",
        err=True,
    )
