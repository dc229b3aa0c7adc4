"""The status of runs, one summary for each, gathered from their directories and their jobs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from data_pipeline.errors import OutlastError
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.checkpoint.format import committed
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.history import ATTEMPT_EVENTS, past_attempts
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.commands.record_summary import EventIndex, last_metrics
from launcher.runs.job_record import read_job, read_outcome
from launcher.runs.sidecar_problems import health_as_json, sidecar_healths, sidecar_problems
from launcher.runs.store import read_config
from launcher.runs.sweep_index import sweep_runs
from launcher.scheduler.jobs import standings
from launcher.scheduler.protocol import CANCELLED, JobState, Standing

UNREADABLE = "unreadable"  # the state of a run whose files cannot be read
SWEEP = "sweep"  # the state of a sweep; the states of its runs are counted in `reason`
_OUTCOME_STATES = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: "stopped"}


@dataclass(frozen=True)
class Status:
    """One run at one moment; None means that the value is not known yet."""

    run_dir: str
    state: str
    reason: str | None = None
    cause: str | None = None
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    attention: str | None = None
    checkpoint_step: int | None = None
    save_problem: str | None = None
    updates_left_out: int = 0
    left_out_in_a_row: int = 0  # up to the newest step
    sidecar_problems: tuple[str, ...] = ()
    sidecars: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0
    restarts: int = 0  # without those by which a person continued a run that had stopped or finished
    requeues: int = 0
    lost_s: float = 0.0
    eta_s: float | None = None
    updated_at: float | None = None
    job_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The status as one JSON object; JSON has no numbers that are not finite, so they are null."""
        return {
            name: None if isinstance(value, float) and not isfinite(value) else value
            for name, value in asdict(self).items()
        }


def status(run: RunDir) -> Status:
    """The status of one run."""
    [found] = statuses([run])
    return found


def statuses(runs: Sequence[RunDir]) -> list[Status]:
    """The status of each run, with one query to the scheduler for all of them.

    A run that cannot be read has the state UNREADABLE and the reason; the other runs are not affected. A
    directory that is a sweep gets the sum of its runs.
    """
    points: dict[Path, list[RunDir]] = {}
    unlisted: dict[Path, Status] = {}  # sweeps whose index cannot be read
    for run in runs:
        try:
            points[run.path] = [run] if run.config.exists() else sweep_runs(run.path) or [run]
        except Exception as error:
            unlisted[run.path] = _unreadable(run, error)
    single = iter(_statuses([each for several in points.values() for each in several]))
    found = {path: [next(single) for _ in several] for path, several in points.items()}
    return [
        unlisted[run.path]
        if run.path in unlisted
        else found[run.path][0]
        if points[run.path] == [run]
        else _sweep_status(run, found[run.path])
        for run in runs
    ]


def _unreadable(run: RunDir, error: Exception) -> Status:
    """The status of a run that `error` keeps from being read.

    A file was edited by hand, is damaged, was written by another version, or belongs to another user. Every
    kind of exception is caught, because even a fault of ours in one run must not hide the others.
    """
    is_expected = isinstance(error, (OutlastError, OSError))
    return Status(
        str(run.path), UNREADABLE, reason=str(error) if is_expected else f"{type(error).__name__}: {error}"
    )


def _statuses(runs: Sequence[RunDir]) -> list[Status]:
    """The status of each run; none of them is a sweep."""
    jobs: dict[Path, Job] = {}
    broken: dict[Path, Exception] = {}
    for run in runs:
        try:
            if (job := read_job(run)) is not None:
                read_outcome(run, job)  # raises when it cannot be read
                jobs[run.path] = job
        except Exception as error:
            broken[run.path] = error
    pairs = [(run, jobs[run.path]) for run in runs if run.path in jobs]
    standing = standings(pairs, with_end_states=True)
    found = []
    for run in runs:
        try:
            if run.path in broken:
                raise broken[run.path]
            found.append(_status(run, jobs.get(run.path), standing.get(run.path)))
        except Exception as error:
            found.append(_unreadable(run, error))
    return found


def _status(run: RunDir, job: Job | None, standing: Standing | None) -> Status:
    config = read_config(run)
    outcome = read_outcome(run, job) if job is not None else None
    state, reason = _state(run, outcome, standing)
    line, scored = last_metrics(run.metrics)
    step = int(line.get("step", 0))
    is_going = state in ("running", "stopping")
    checkpoints = committed(run.checkpoints)
    events = EventIndex(run.events)
    attempts = past_attempts(events.each(*ATTEMPT_EVENTS))
    left_out = {event["step"] for event in events.each(Event.UPDATE_SKIPPED) if event["step"] <= step}
    healths = sidecar_healths(run, config)
    if is_going and job is not None:  # what an earlier job left says nothing about this one
        healths = {name: now for name, now in healths.items() if now.time >= job.submitted_at}
    has_ended = outcome is not None or (standing is not None and standing.state == JobState.ENDED)
    return Status(
        run_dir=str(run.path),
        state=state,
        reason=(_start_problem(events) if is_going else None) or reason or None,
        cause=outcome.cause if outcome is not None else None,
        step=step,
        total_steps=config.total_steps,
        tokens=int(line.get("tokens") or 0),
        loss=line.get("train/loss"),
        val_loss=scored.get("val/loss"),
        tokens_per_second=line.get("train/tokens_per_second") if is_going else None,
        mfu=line.get("train/mfu") if is_going else None,
        attention=events.last(Event.NETWORK_BUILT).get("attention"),
        checkpoint_step=checkpoints[-1][0] if checkpoints else None,
        save_problem=_save_problem(events) or _mirror_problem(events) if is_going else None,
        updates_left_out=len(left_out),
        left_out_in_a_row=next(count for count in range(step + 1) if step - count not in left_out),
        sidecar_problems=tuple(
            sidecar_problems(run, healths, is_running=is_going, has_ended=has_ended, step=step)
        ),
        sidecars=health_as_json(healths),
        attempts=len(run.attempt_numbers()),
        restarts=sum(attempt.is_restart for attempt in attempts),
        requeues=events.count(Event.REQUEUED),
        lost_s=sum(attempt.lost_s for attempt in attempts),
        eta_s=_left_s(config.batch.sizes, config.total_steps, line) if is_going else None,
        updated_at=line.get("time"),
        job_id=job.job_id if job is not None else None,
    )


def _sweep_status(sweep: RunDir, runs: Sequence[Status]) -> Status:
    """The sum of a sweep's runs; its validation loss is the best one."""
    readable = [run for run in runs if run.state != UNREADABLE]
    losses = [run.val_loss for run in readable if run.val_loss is not None]
    speeds = [run.tokens_per_second for run in readable if run.tokens_per_second is not None]
    times = [run.updated_at for run in readable if run.updated_at is not None]
    counts = Counter(run.state for run in runs)
    return Status(
        run_dir=str(sweep.path),
        state=SWEEP,
        reason=", ".join(f"{count} {state}" for state, count in counts.most_common()),
        step=sum(run.step for run in readable),
        total_steps=sum(run.total_steps for run in readable),
        tokens=sum(run.tokens for run in readable),
        val_loss=min(losses, default=None),
        tokens_per_second=sum(speeds) if speeds else None,
        updates_left_out=sum(run.updates_left_out for run in readable),
        attempts=sum(run.attempts for run in readable),
        restarts=sum(run.restarts for run in readable),
        requeues=sum(run.requeues for run in readable),
        lost_s=sum(run.lost_s for run in readable),
        updated_at=max(times, default=None),
    )


def _left_s(sizes: BatchSizes, total_steps: int, line: dict[str, Any]) -> float | None:
    """Seconds until the last step, at the speed of the newest one; None before the first step."""
    step = int(line.get("step", 0))
    seconds: float | None = line.get("train/step_seconds")
    if step == 0 or seconds is None or seconds < 0:
        return None
    left = max(0, sizes.until(total_steps) - sizes.until(step))
    return seconds * left / sizes.at(step)


def _state(run: RunDir, outcome: JobOutcome | None, standing: Standing | None) -> tuple[str, str]:
    """The state, and the scheduler's reason for it: where a job runs, why it waits, or why it ended."""
    if standing is None:
        return ("created" if not run.attempt_numbers() else "copied"), ""
    if outcome is not None:
        return "cancelled" if outcome.is_cancelled else _OUTCOME_STATES.get(outcome.exit_code, "failed"), ""
    if standing.state == JobState.RUNNING and run.stop.exists():
        return "stopping", standing.reason
    if standing.state != JobState.ENDED:
        return standing.state, standing.reason
    return "cancelled" if standing.scheduler_state == CANCELLED else "lost", standing.scheduler_state


def _start_problem(events: EventIndex) -> str | None:
    """Why no attempt begins; None once one has."""
    newest = events.last(Event.JOB_RUN_STARTED, Event.ATTEMPT_STARTED, Event.WORKERS_CRASHED)
    if newest.get("event") != Event.WORKERS_CRASHED:
        return None
    return f"the workers crash before an attempt begins: {newest.get('cause')}"


def _save_problem(events: EventIndex) -> str | None:
    """Why the newest checkpoint that was due could not be saved; None when it was."""
    newest = events.last(Event.CHECKPOINT_SAVED, Event.CHECKPOINT_FAILED, Event.CHECKPOINT_SKIPPED)
    if not newest or newest["event"] == Event.CHECKPOINT_SAVED:
        return None
    return f"the checkpoint of step {newest['step']} was not saved: {newest['reason']}"


def _mirror_problem(events: EventIndex) -> str | None:
    """Why the newest checkpoint could not be copied to the mirror; None when it was."""
    newest = events.last(Event.MIRRORED, Event.MIRROR_FAILED)
    return f"not mirrored: {newest['reason']}" if newest.get("event") == Event.MIRROR_FAILED else None
