"""The status of runs, one summary for each, gathered from their directories and their jobs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import OutlastError
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.checkpoint.format import committed
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.commands.record_summary import EventIndex, last_metrics
from launcher.runs.job_record import read_job, read_outcome
from launcher.runs.sidecar_problems import health_as_json, sidecar_healths, sidecar_problems
from launcher.runs.store import read_config
from launcher.scheduler.jobs import standings
from launcher.scheduler.protocol import CANCELLED, JobState, Standing

UNREADABLE = "unreadable"  # the state of a run whose files cannot be read
# A file was edited by hand, was written by another version, or belongs to another user.
_READ_ERRORS = (OutlastError, OSError)
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
    sidecar_problems: tuple[str, ...] = ()
    sidecars: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0
    requeues: int = 0
    lost_s: float = 0.0
    eta_s: float | None = None
    updated_at: float | None = None
    job_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The status as one JSON object."""
        return asdict(self)


def status(run: RunDir) -> Status:
    """The status of one run."""
    [found] = statuses([run])
    return found


def statuses(runs: Sequence[RunDir]) -> list[Status]:
    """The status of each run, with one query to the scheduler for all of them.

    A run that cannot be read has the state UNREADABLE and the reason; the other runs are not affected.
    """
    jobs: dict[Path, Job] = {}
    broken: dict[Path, Exception] = {}
    for run in runs:
        try:
            if (job := read_job(run)) is not None:
                read_outcome(run, job)  # raises when it cannot be read
                jobs[run.path] = job
        except _READ_ERRORS as error:
            broken[run.path] = error
    pairs = [(run, jobs[run.path]) for run in runs if run.path in jobs]
    standing = standings(pairs, with_end_states=True)
    found = []
    for run in runs:
        try:
            if run.path in broken:
                raise broken[run.path]
            found.append(_status(run, jobs.get(run.path), standing.get(run.path)))
        except _READ_ERRORS as error:
            found.append(Status(str(run.path), UNREADABLE, reason=str(error)))
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
    healths = sidecar_healths(run, config)
    if is_going and job is not None:  # what an earlier job left says nothing about this one
        healths = {name: now for name, now in healths.items() if now.time >= job.submitted_at}
    has_ended = outcome is not None or (standing is not None and standing.state == JobState.ENDED)
    return Status(
        run_dir=str(run.path),
        state=state,
        reason=reason or None,
        cause=outcome.cause if outcome is not None else None,
        step=step,
        total_steps=config.total_steps,
        tokens=int(line.get("tokens", 0)),
        loss=line.get("train/loss"),
        val_loss=scored.get("val/loss"),
        tokens_per_second=line.get("train/tokens_per_second") if is_going else None,
        mfu=line.get("train/mfu") if is_going else None,
        attention=events.last(Event.NETWORK_BUILT).get("attention"),
        checkpoint_step=checkpoints[-1][0] if checkpoints else None,
        save_problem=_save_problem(events) or _mirror_problem(events) if is_going else None,
        sidecar_problems=tuple(
            sidecar_problems(run, healths, is_running=is_going, has_ended=has_ended, step=step)
        ),
        sidecars=health_as_json(healths),
        attempts=len(run.attempt_numbers()),
        requeues=events.count(Event.REQUEUED),
        lost_s=sum(event.get("lost_s", 0.0) for event in events.each(Event.CONTINUED)),
        eta_s=_left_s(config.batch.sizes, config.total_steps, line) if is_going else None,
        updated_at=line.get("time"),
        job_id=job.job_id if job is not None else None,
    )


def _left_s(sizes: BatchSizes, total_steps: int, line: dict[str, Any]) -> float | None:
    """Seconds until the last step, at the speed of the newest one; None before the first step."""
    step = int(line.get("step", 0))
    seconds: float | None = line.get("train/step_seconds")
    if step == 0 or seconds is None:
        return None
    left = sizes.until(total_steps) - sizes.until(step)
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
