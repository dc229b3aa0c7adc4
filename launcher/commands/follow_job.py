"""Submits a run's job and follows it until it ends: progress on the terminal, signals as stop requests."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TextIO

import click

from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import is_listed
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.progress import Display
from launcher.commands.record_follower import RecordFollower, Update
from launcher.commands.sidecar_watch import SidecarWatch
from launcher.commands.signal_guard import SignalGuard
from launcher.commands.submit import submit
from launcher.runs.job_record import read_outcome
from launcher.scheduler.registry import scheduler_of

# Is called with every update and with a function that prints a line above the progress bar.
Observer = Callable[[Update, Callable[[str], None]], None]


def submit_and_follow(
    run: RunDir,
    total_steps: int,
    cluster: ClusterConfig,
    reason: str,
    attend: bool | None,
    claim: TextIO | None = None,
) -> int:
    """Submit `run` and follow its job if `attend` says so, by default a local job only; the exit code.

    Prints the run directory last. `claim`, the right to start the run, is given up once the job exists.
    """
    follower = RecordFollower(run)
    with SignalGuard(run) as guard:
        job: Job = submit(run, reason)
        if claim is not None:
            claim.close()  # from here on job.json refuses a second start
        is_attended = scheduler_of(cluster.kind).is_attended if attend is None else attend
        code = 0
        if is_attended or guard.has_signal:  # a signal during the submission is a stop request
            click.echo(f"run directory: {run.path} (outlast status, logs and stop take it)", err=True)
            outcome = follow_job(run, job, follower, total_steps, guard=guard)
            code = outcome.exit_code
            click.echo(outcome.cause if code == 0 else f"exit code {code}: {outcome.cause}", err=True)
            if is_listed(run.config):
                click.echo(_next_command(run, code), err=True)
        else:
            click.echo(
                f"submitted {job.executor} job {job.job_id}; check it with: outlast status {run.path}",
                err=True,
            )
    click.echo(run.path)
    return code


def _next_command(run: RunDir, code: int) -> str:
    """What a user does after a run that ended with `code`."""
    match code:
        case ExitCode.FINISHED:
            return f"try it with: outlast sample {run.path} --prompt 'Once upon a time'"
        case ExitCode.STOPPED:
            return f"continue with: outlast resume {run.path}"
        case _:
            return f"look into it with: outlast logs {run.path}; continue with: outlast resume {run.path}"


def start_and_follow(
    run: RunDir,
    total_steps: int,
    reason: str,
    observe: Observer | None = None,
    submitted: Callable[[Job], None] = lambda _: None,
    quiet: Collection[Event] = (),
) -> JobOutcome:
    """Submit `run`, call `submitted` with its job, and follow that until it ends. `quiet` is not shown."""
    follower = RecordFollower(run)
    with SignalGuard(run) as guard:
        job = submit(run, reason)
        submitted(job)
        return follow_job(run, job, follower, total_steps, observe, guard, quiet)


def follow_job(
    run: RunDir,
    job: Job,
    follower: RecordFollower,
    total_steps: int,
    observe: Observer | None = None,
    guard: SignalGuard | None = None,
    quiet: Collection[Event] = (),
) -> JobOutcome:
    """Show the progress of `job` until it ends, and return how it ended. Ctrl-C saves and stops it.

    `guard` has caught the signals since before the job was submitted; without it they are caught from now on.
    The events named in `quiet` are not shown.
    """
    sidecars = SidecarWatch(run)
    with ExitStack() as stack:
        display = stack.enter_context(Display(total_steps, quiet))
        if guard is None:
            guard = stack.enter_context(SignalGuard(run))
        guard.note = display.note
        for update in follower.updates(job):
            display.show(update)
            for sentence in sidecars.news():
                display.note(sentence)
            if observe is not None:
                observe(update, display.note)
            guard.answer()
            if guard.has_signal:
                display.describe("stopping")
        for sentence in sidecars.last_words():
            display.note(sentence)
    return outcome_of(run, job)


def outcome_of(run: RunDir, job: Job) -> JobOutcome:
    """How an ended `job` ended; a job that left no outcome counts as failed."""
    if not is_listed(run.config):
        gone = (
            f"{run.path} is gone: the run directory was moved or deleted while the run was going. If it is "
        )
        gone += "elsewhere, `outlast resume` continues the run there."
        return JobOutcome(exit_code=ExitCode.DO_NOT_RESTART, cause=gone, attempt=None)
    folder = run.submission(job.submission).path
    lost = f"the job ended without reporting an outcome, as when its node fails; its logs are in {folder}"
    return read_outcome(run, job) or JobOutcome(exit_code=ExitCode.FAILED, cause=lost, attempt=None)
