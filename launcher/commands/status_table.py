"""The table of `outlast status`: one row for each run."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gpt.run.run_dir import RunDir
from launcher.commands.status import UNREADABLE, Status, statuses
from launcher.units import counted, duration, one_line

_REFRESH_S = 5.0  # squeue is a shared service
_PIPE_WIDTH = 180  # a pipe has no width of its own
_WIDEST_CELL = 60
_WIDE_NUMBER = 1e15  # from here on it would squeeze the other columns
_LEFT_OUT_WARNING = 10  # fp16 leaves out some at the start, until it has found its loss scale
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
    """The runs as a table; what does not fit into it is listed below."""
    result = Table(box=None, pad_edge=False, caption_justify="left")
    notes = []
    for heading in _HEADINGS:
        result.add_column(heading, justify="left" if heading in _LEFT_ALIGNED else "right", no_wrap=True)
    for run, now in zip(runs, statuses(runs), strict=True):
        if now.state == UNREADABLE:
            result.add_row(cell(run.path.name), UNREADABLE)
            notes.append(f"{run.path.name}: {UNREADABLE}: {now.reason}")
            continue
        result.add_row(
            cell(run.path.name),
            cell(now.state),
            cell(now.reason or ""),
            f"{now.step}/{now.total_steps}",
            _number(now.loss, ".4f"),
            _number(now.val_loss, ".4f"),
            _number(now.tokens_per_second, ",.0f"),
            _number(now.mfu, ".1%"),
            cell(now.attention or "–"),
            _number(now.checkpoint_step, "d"),
            str(now.restarts),
            duration(now.lost_s) if now.lost_s else "–",
            duration(now.eta_s) if now.eta_s is not None else "–",
            f"{duration(time.time() - now.updated_at)} ago" if now.updated_at is not None else "–",
        )
        notes += [f"{run.path.name}: {note}" for note in _notes(now)]
    result.caption = Text("\n".join(one_line(note) for note in notes)) if notes else None
    return result


def cell(text: str) -> Text:
    """A text from a file or a name as a cell. Rich would obey markup in it, and squeeze the other columns."""
    return Text(one_line(text, _WIDEST_CELL))


def _notes(now: Status) -> Iterator[str]:
    """What a person should know about a run beside its numbers."""
    if now.save_problem is not None:
        yield now.save_problem
    yield from now.sidecar_problems
    if now.left_out_in_a_row >= _LEFT_OUT_WARNING:
        yield (
            f"the last {counted(now.left_out_in_a_row, 'update')} did not change the weights, because the "
            "gradient was not finite: the run no longer learns"
        )
    elif now.updates_left_out:
        yield f"{counted(now.updates_left_out, 'update')} left out, because the gradient was not finite"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if abs(value) < _WIDE_NUMBER else f"{value:.3g}"
