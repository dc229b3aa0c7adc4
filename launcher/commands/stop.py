"""`outlast stop`: asks a run to save and stop, and waits until it has."""

import time

import click

from data_pipeline.errors import LaunchError
from gpt.run import record
from gpt.run.events import Event, read_events
from gpt.run.exit_codes import ExitCode
from gpt.run.run_dir import RunDir
from launcher.commands.follow_job import outcome_of
from launcher.runs.job_record import read_job
from launcher.runs.store import open_run
from launcher.scheduler.jobs import JobWatcher, ask_to_stop, job_state
from launcher.scheduler.protocol import JobState
from launcher.units import duration

_POLL_S = 0.2
_WORD_S = 10.0
_SILENCE_S = 120.0  # a Slurm controller restarts in less


def stop(folder: str, *, now: bool) -> int:
    """Ask a run to save and stop (`now`: to stop without saving) and wait until it has; the exit code."""
    run = open_run(folder)
    job = read_job(run)
    if job is None or job_state(run, job) == JobState.ENDED:
        raise LaunchError(f"{folder} is not running. `outlast status {folder}` shows how it ended.")
    reason = "outlast stop --now" if now else "outlast stop"
    ask_to_stop(run, reason, lambda sentence: click.echo(sentence, err=True), now=now)
    click.echo("stopping without saving" if now else "saving, then stopping", err=True)
    watcher = JobWatcher(run, job, serves_stop=True)
    said, next_word = "", 0.0
    while (state := watcher.state()) != JobState.ENDED:
        if state == JobState.RUNNING and not now and time.monotonic() >= next_word:
            next_word = time.monotonic() + _WORD_S
            if (word := waits_for(run)) != said:
                said = word
                click.echo(word, err=True)
        if watcher.unknown_s > _SILENCE_S:
            click.echo(
                f"the state of {job.executor} job {job.job_id} on {job.host} is unknown from here. The stop "
                f"request remains in {run.stop}: the job ends when it reads it. `outlast status {folder}` "
                "shows whether it has.",
                err=True,
            )
            return 1
        time.sleep(_POLL_S)
    outcome = outcome_of(run, job)
    click.echo(outcome.cause, err=True)
    # A run that finished before it saw the request has also done what was asked.
    return 0 if now or outcome.exit_code in (ExitCode.FINISHED, ExitCode.STOPPED) else outcome.exit_code


def waits_for(run: RunDir) -> str:
    """What a run that was asked to stop still has to do."""
    starts = list(read_events(run.events, Event.JOB_RUN_STARTED, Event.ATTEMPT_STARTED, Event.PHASE))
    line = record.last(run.metrics)
    if not starts or starts[-1]["event"] == Event.JOB_RUN_STARTED:
        return "waiting for the workers to start; they see the request then"
    if starts[-1]["event"] == Event.ATTEMPT_STARTED or line is None:
        return "waiting for the workers, which are starting; they see the request before their first step"
    seconds = line.get("train/step_seconds")
    pace = f", which takes about {duration(seconds)}" if isinstance(seconds, int | float) else ""
    return f"step {line.get('step')} is done; waiting for the next one{pace}, and for its checkpoint"
