"""The table of `outlast status`: one row for each run."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gpt.run.run_dir import RunDir
from launcher.commands.status import UNREADABLE, statuses
from launcher.units import duration

_REFRESH_S = 5.0  # squeue is a shared service
_PIPE_WIDTH = 180  # a pipe has no width of its own
_LEFT_ALIGNED = ("run", "state", "reason")
_HEADINGS = (
    *_LEFT_ALIGNED,
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
)


def show(find: Callable[[], Sequence[RunDir]], *, watch: bool) -> None:
    """Print the table of the runs that `find` returns; `watch` refreshes it in place until Ctrl-C."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    if not watch:
        console.print(table(find()))
        return
    with suppress(KeyboardInterrupt), Live(table(find()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(table(find()), refresh=True)


def table(runs: Sequence[RunDir]) -> Table:
    """The runs as a table; problems with saving and of sidecars are listed below it."""
    result = Table(box=None, pad_edge=False, caption_justify="left")
    problems = []
    for heading in _HEADINGS:
        result.add_column(heading, justify="left" if heading in _LEFT_ALIGNED else "right", no_wrap=True)
    for run, now in zip(runs, statuses(runs), strict=True):
        if now.state == UNREADABLE:
            result.add_row(run.path.name, f"{UNREADABLE}: {now.reason}")
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
        problems += [f"{run.path.name}: {problem}" for problem in now.sidecar_problems]
    result.caption = "\n".join(problems) or None
    return result


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "–"
