"""`outlast goodput`: where the wall-clock time of a run went, attempt by attempt."""

import json
import time
from collections.abc import Iterable
from typing import Any

import click
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt.run import record
from gpt.run.events import read_events
from gpt.run.goodput import AttemptTime, Category, Goodput, Seconds, goodput
from gpt.run.run_dir import RunDir
from launcher.commands.status import status
from launcher.runs.store import open_run
from launcher.units import duration

_GOING = ("running", "stopping", "pending")
_LABELS = {
    Category.PRODUCTIVE: "training steps",
    Category.REPEATED: "steps computed again after a failure",
    Category.LEFT_OUT: "steps whose update was left out",
    Category.DATA: "waiting for data",
    Category.EVALUATION: "evaluation",
    Category.SAVING: "stopped by saves",
    Category.FINAL_SAVE: "the last save of an attempt",
    Category.QUEUE: "waiting in the queue",
    Category.START: "starting",
    Category.COMPILE: "compiling",
    Category.LOAD: "loading a checkpoint",
    Category.HANG: "hanging, until that was noticed",
    Category.RECOVERY: "between a failure and the next start",
    Category.DOWN: "at rest, stopped by a person or finished",
    Category.UNKNOWN: "unknown",
}


def show_goodput(folder: str, *, as_json: bool) -> int:
    """Print where the time of the run in `folder` went; the exit code."""
    run = open_run(folder)
    found = goodput_of(run, is_running=status(run).state in _GOING)
    if as_json:
        click.echo(json.dumps(None if found is None else _as_json(found)))
    elif found is None:
        click.echo(f"{run.path} has no events yet: it was never submitted.", err=True)
    else:
        _show(found)
    return 0


def goodput_of(run: RunDir, *, is_running: bool) -> Goodput | None:
    """Where the time of `run` went; None if it was never submitted."""
    steps = record.read_steps(run.metrics)
    return goodput(read_events(run.events), steps, time.time(), is_running=is_running)


def _show(found: Goodput) -> None:
    productive, used = found.processor_hours
    console = Console()
    trained_s = found.seconds.get(Category.PRODUCTIVE, 0.0)
    active_s = found.wall_s - found.seconds.get(Category.DOWN, 0.0)
    console.print(
        f"goodput {found.share:.1%}: {duration(trained_s)} of training steps in {duration(active_s)}",
        highlight=False,
    )
    console.print(f"{productive:,.2f} of {used:,.2f} process hours were productive", highlight=False)
    console.print(_table(found))
    if len(found.attempts) > 1:
        console.print(_attempts(found.attempts))
    for line in _failures(found):
        console.print(line, highlight=False, markup=False)


def _table(found: Goodput) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=20)
    seconds = found.seconds
    for category in sorted(seconds, key=lambda name: -seconds[name]):
        if seconds[category] >= 0.05:
            share = seconds[category] / found.wall_s
            bar = Bar(1.0, 0.0, share, width=20)
            table.add_row(_LABELS[category], duration(seconds[category]), f"{share:.1%}", bar)
    return table


def _attempts(attempts: Iterable[AttemptTime]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("attempt", "time", "productive", "starting", "lost", "ended"):
        table.add_column(name, justify="left" if name == "ended" else "right")
    for attempt in attempts:
        whole = attempt.end - attempt.start
        starting = sum(attempt.seconds.get(name, 0.0) for name in (Category.START, Category.LOAD))
        productive = attempt.seconds.get(Category.PRODUCTIVE, 0.0)
        table.add_row(
            str(attempt.number),
            duration(whole),
            f"{productive / whole:.1%}" if whole else "–",
            duration(starting),
            duration(attempt.seconds.get(Category.REPEATED, 0.0)),
            Text(": ".join(filter(None, [attempt.how, attempt.cause.partition("\n")[0]]))),
        )
    return table


def _failures(found: Goodput) -> Iterable[str]:
    failures = found.failures
    if not failures:
        return
    running_s = sum(attempt.end - attempt.start for attempt in found.attempts)
    yield f"failures: {len(failures)}, one every {duration(running_s / len(failures))} of running"
    recovery_s = sum(
        seconds.get(name, 0.0) for seconds in [found.between] for name in (Category.HANG, Category.RECOVERY)
    )
    yield f"mean time from a failure to the next start: {duration(recovery_s / len(failures))}"


def _as_json(found: Goodput) -> dict[str, Any]:
    productive, used = found.processor_hours
    return {
        "goodput": found.share,
        "wall_s": found.wall_s,
        "seconds": _named(found.seconds),
        "between": _named(found.between),
        "process_hours": {"productive": productive, "used": used},
        "failures": len(found.failures),
        "attempts": [
            {
                "attempt": attempt.number,
                "start": attempt.start,
                "end": attempt.end,
                "how": str(attempt.how),
                "cause": attempt.cause,
                "world_size": attempt.world_size,
                "seconds": _named(attempt.seconds),
            }
            for attempt in found.attempts
        ],
    }


def _named(seconds: Seconds) -> dict[str, float]:
    return {category.value: round(value, 3) for category, value in seconds.items()}
