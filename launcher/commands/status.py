"""What is going on with runs, from their directories and their jobs: one summary each, no torch.

Reads the last lines of a record, never the whole of a long one, so that a hundred runs take a moment.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from data_pipeline.errors import OutlastError
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.checkpoint.format import committed
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.commands.progress import duration
from launcher.runs.job_record import read_job, read_outcome
from launcher.runs.store import read_config
from launcher.scheduler.jobs import standings
from launcher.scheduler.protocol import CANCELLED, Standing

_TAIL_BYTES = 1 << 18  # about a thousand steps
_WATCH_S = 5.0  # squeue is a shared service
_UNREADABLE = (OutlastError, OSError)  # what a hand, another version or another user's rights make of a run
_OUTCOME_STATES = {ExitCode.FINISHED: "finished", ExitCode.STOPPED: "stopped"}


@dataclass(frozen=True)
class Status:
    """One run at one moment; None where nothing is known yet."""

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
    attempts: int = 0
    requeues: int = 0
    lost_s: float = 0.0
    eta_s: float | None = None
    updated_at: float | None = None
    job_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def status(run: RunDir) -> Status:
    """The status of one run."""
    [found] = statuses([run])
    return found


def statuses(runs: Sequence[RunDir]) -> list[Status]:
    """The status of each run; the scheduler is asked once for all.

    One that cannot be read is "unreadable", with the reason, and stands in the way of no other.
    """
    jobs: dict[Path, Job] = {}
    broken: dict[Path, Exception] = {}
    for run in runs:
        try:
            if (job := read_job(run)) is not None:
                read_outcome(run, job)  # raises when it cannot be read
                jobs[run.path] = job
        except _UNREADABLE as error:
            broken[run.path] = error
    pairs = [(run, jobs[run.path]) for run in runs if run.path in jobs]
    standing = standings(pairs, with_end_states=True)
    found = []
    for run in runs:
        try:
            if run.path in broken:
                raise broken[run.path]
            found.append(_status(run, jobs.get(run.path), standing.get(run.path)))
        except _UNREADABLE as error:
            found.append(Status(str(run.path), "unreadable", reason=str(error)))
    return found


def _status(run: RunDir, job: Job | None, standing: Standing | None) -> Status:
    config = read_config(run)
    outcome = read_outcome(run, job) if job is not None else None
    word, reason = _state(run, outcome, standing)
    line, scored = _last_lines(run)
    step = int(line.get("step", 0))
    is_going = word in ("running", "stopping")
    checkpoints = committed(run.checkpoints)
    events = _Events(run.events)
    return Status(
        run_dir=str(run.path),
        state=word,
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
        attempts=len(run.attempt_numbers()),
        requeues=events.count(Event.REQUEUED),
        lost_s=sum(event.get("lost_s", 0.0) for event in events.each(Event.CONTINUED)),
        eta_s=_left_s(config.batch.sizes, config.total_steps, line) if is_going else None,
        updated_at=line.get("time"),
        job_id=job.job_id if job is not None else None,
    )


def _left_s(sizes: BatchSizes, total_steps: int, line: dict[str, Any]) -> float | None:
    """Seconds to the last step, at the rate of the last one; None before the first."""
    step = int(line.get("step", 0))
    seconds: float | None = line.get("train/step_seconds")
    if step == 0 or seconds is None:
        return None
    left = sizes.until(total_steps) - sizes.until(step)
    return seconds * left / sizes.at(step)


def show(find: Callable[[], Sequence[RunDir]], *, watch: bool) -> None:
    """The table on standard output; `watch`: again and again in its place, until Ctrl-C, with new runs."""
    console = Console()
    if not console.is_terminal:
        console.width = 180  # a pipe has no width to keep to
    if not watch:
        console.print(table(find()))
        return
    with suppress(KeyboardInterrupt), Live(table(find()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_S)
            live.update(table(find()), refresh=True)


def table(runs: Sequence[RunDir]) -> Table:
    """The runs as a table for people; one that cannot be read says why in its row."""
    result = Table(box=None, pad_edge=False, caption_justify="left")
    problems = []
    for heading in (
        "run",
        "state",
        "reason",
        "step",
        "loss",
        "val loss",
        "tokens/s",
        "MFU",
        "attention",
        "saved",
        "restarts",
        "lost",
        "left",
        "seen",
    ):
        result.add_column(
            heading, justify="left" if heading in ("run", "state", "reason") else "right", no_wrap=True
        )
    for run, now in zip(runs, statuses(runs), strict=True):
        if now.state == "unreadable":
            result.add_row(run.path.name, f"unreadable: {now.reason}")
            continue
        result.add_row(
            run.path.name,
            now.state,
            now.reason or "",
            f"{now.step}/{now.total_steps}",
            _number(now.loss, ".4f"),
            _number(now.val_loss, ".4f"),
            _number(now.tokens_per_second, ",.0f"),
            _number(now.mfu, ".1%"),
            now.attention or "–",
            _number(now.checkpoint_step, "d"),
            str(max(0, now.attempts - 1)),
            duration(now.lost_s) if now.lost_s else "–",
            duration(now.eta_s) if now.eta_s is not None else "–",
            f"{duration(time.time() - now.updated_at)} ago" if now.updated_at is not None else "–",
        )
        if now.save_problem is not None:
            problems.append(f"{run.path.name}: {now.save_problem}")
    result.caption = "\n".join(problems) or None
    return result


def _state(run: RunDir, outcome: JobOutcome | None, standing: Standing | None) -> tuple[str, str]:
    """The state in a word, and the scheduler's reason (where a job runs, why it waits or has ended)."""
    if standing is None:
        return ("created" if not run.attempt_numbers() else "copied"), ""
    if outcome is not None:
        return "cancelled" if outcome.is_cancelled else _OUTCOME_STATES.get(outcome.exit_code, "failed"), ""
    if standing.state == "running" and run.stop.exists():
        return "stopping", standing.reason
    if standing.state != "ended":
        return standing.state, standing.reason
    return "cancelled" if standing.scheduler_state == CANCELLED else "lost", standing.scheduler_state


def _save_problem(events: "_Events") -> str | None:
    """Why the newest checkpoint that was due is not there, if it is not."""
    newest = events.last(Event.CHECKPOINT_SAVED, Event.CHECKPOINT_FAILED, Event.CHECKPOINT_SKIPPED)
    if not newest or newest["event"] == Event.CHECKPOINT_SAVED:
        return None
    return f"step {newest['step']} is not saved: {newest['reason']}"


def _mirror_problem(events: "_Events") -> str | None:
    """Why the newest checkpoint is not at the mirror, if it could not be copied."""
    newest = events.last(Event.MIRRORED, Event.MIRROR_FAILED)
    return f"not mirrored: {newest['reason']}" if newest.get("event") == Event.MIRROR_FAILED else None


class _Events:
    """A run's events by name: the file is read once, and parsed only where a line is asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._content = path.read_bytes()
        except FileNotFoundError:
            self._content = b""

    def count(self, name: Event) -> int:
        """How many there are of one name."""
        return self._content.count(_mark(name))

    def each(self, name: Event) -> Iterator[dict[str, Any]]:
        """Those of one name, the oldest first."""
        at = self._content.find(_mark(name))
        while at != -1:
            yield from self._line(at)
            at = self._content.find(_mark(name), at + 1)

    def last(self, *names: Event) -> dict[str, Any]:
        """The newest of those of these names; empty where there is none."""
        at = max(self._content.rfind(_mark(name)) for name in names)
        return next(self._line(at), {}) if at != -1 else {}

    def _line(self, at: int) -> Iterator[dict[str, Any]]:
        start, end = self._content.rfind(b"\n", 0, at) + 1, self._content.find(b"\n", at)
        with suppress(ValueError):  # torn by a kill
            yield json.loads(self._content[start : end if end != -1 else None])


def _mark(name: Event) -> bytes:
    return f'"event": "{name.value}"'.encode()


def _last_lines(run: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last whole line of the record, and the last one with a validation loss; empty where there is none.

    Only these two are parsed: at a hundred runs a parse of every line in reach takes seconds.
    """
    try:
        with run.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            whole = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}, {}
    newest: dict[str, Any] = {}
    for raw in reversed(whole):
        if newest and b'"val/loss"' not in raw:
            continue
        try:
            line = json.loads(raw)
        except ValueError:
            continue  # torn by a kill, or cut where the tail begins
        if not isinstance(line, dict):
            continue
        newest = newest or line
        if "val/loss" in line:
            return newest, line
    return newest, {}


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "–"
