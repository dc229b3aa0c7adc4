"""What is going on with runs, from their directories and their jobs: one summary each, no torch.

Reads the last lines of a record, never the whole of a long one, so that a hundred runs take a moment.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from data_pipeline.errors import OutlastError
from gpt.checkpoint.format import committed
from gpt.run_dir import RunDir
from launcher.follow import duration
from launcher.runs import read_config
from launcher.submit import Job, Outcome, read_job, read_outcome, state

_TAIL_BYTES = 1 << 18  # about a thousand steps
_OUTCOME_STATES = {0: "finished", 75: "stopped"}


@dataclass(frozen=True)
class Status:
    """One run at one moment; None where nothing is known yet."""

    run_dir: str
    state: str
    cause: str | None
    step: int
    total_steps: int
    tokens: int
    loss: float | None
    val_loss: float | None
    tokens_per_second: float | None
    checkpoint_step: int | None
    attempts: int
    eta_s: float | None
    updated_at: float | None
    job_id: str | None

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def status(run: RunDir) -> Status:
    """The status of one run. Raises OutlastError when its config cannot be read."""
    total_steps = read_config(run).total_steps
    job = read_job(run)
    outcome = read_outcome(run, job) if job is not None else None
    word = _state(run, job, outcome)
    line, scored = _last_lines(run)
    step = int(line.get("step", 0))
    is_going = word in ("running", "stopping")
    checkpoints = committed(run.checkpoints)
    return Status(
        run_dir=str(run.path),
        state=word,
        cause=outcome.cause if outcome is not None else None,
        step=step,
        total_steps=total_steps,
        tokens=int(line.get("tokens", 0)),
        loss=line.get("train/loss"),
        val_loss=scored.get("val/loss"),
        tokens_per_second=line.get("train/tokens_per_second") if is_going else None,
        checkpoint_step=checkpoints[-1][0] if checkpoints else None,
        attempts=len(run.attempt_numbers()),
        eta_s=(total_steps - step) * line["train/step_seconds"] if is_going and line else None,
        updated_at=line.get("time"),
        job_id=job.job_id if job is not None else None,
    )


def table(runs: Sequence[RunDir]) -> Table:
    """The runs as a table for people; one that cannot be read says why in its row."""
    result = Table(box=None, pad_edge=False)
    for heading in (
        "run",
        "state",
        "step",
        "loss",
        "val loss",
        "tokens/s",
        "saved",
        "restarts",
        "left",
        "seen",
    ):
        result.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        try:
            now = status(run)
        except OutlastError as error:
            result.add_row(run.path.name, f"unreadable: {error}")
            continue
        result.add_row(
            run.path.name,
            now.state,
            f"{now.step}/{now.total_steps}",
            _number(now.loss, ".4f"),
            _number(now.val_loss, ".4f"),
            _number(now.tokens_per_second, ",.0f"),
            _number(now.checkpoint_step, "d"),
            str(max(0, now.attempts - 1)),
            duration(now.eta_s) if now.eta_s is not None else "–",
            f"{duration(time.time() - now.updated_at)} ago" if now.updated_at is not None else "–",
        )
    return result


def _state(run: RunDir, job: Job | None, outcome: Outcome | None) -> str:
    if job is None:
        return "created" if not run.attempt_numbers() else "copied"
    if outcome is not None:
        return _OUTCOME_STATES.get(outcome.exit_code, "failed")
    word = state(run, job)
    if word == "running" and run.stop.exists():
        return "stopping"
    return "lost" if word == "ended" else word


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
        newest = newest or line
        if "val/loss" in line:
            return newest, line
    return newest, {}


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "–"
