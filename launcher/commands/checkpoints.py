"""`outlast checkpoints`: what a run has saved, what of it is whole, and what stays for ever."""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from data_pipeline.durable import fsync_folder
from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import PIN_NAME, Corrupt, committed, is_pinned, read_index, verify
from gpt.run import record
from gpt.run.events import Event
from gpt.run.run_dir import UNCOMMITTED_PREFIX, RunDir
from launcher.units import size

_FEWEST = 2  # the newest, and one for the case that it turns out to be bad


@dataclass(frozen=True)
class Listed:
    """One committed checkpoint."""

    step: int
    size_bytes: int
    saved_at: float
    world_size: int | None
    stage: int | None
    verified: str
    is_pinned: bool
    val_loss: float | None


def checkpoints(
    run: RunDir,
    *,
    pin: Sequence[int],
    unpin: Sequence[int],
    delete: Sequence[int],
    delete_set_aside: bool,
    check: bool,
    as_json: bool,
) -> int:
    """Pin, unpin and delete, then list; 1 when `check` (reading every byte) finds a bad one."""
    there = dict(committed(run.checkpoints))
    _refuse_unknown(there, [*pin, *unpin, *delete])
    for step in pin:
        (there[step] / PIN_NAME).touch()
    for step in unpin:
        (there[step] / PIN_NAME).unlink(missing_ok=True)
    _delete(there, delete)
    if delete_set_aside:
        _delete_set_aside(run)
    rows = _list(run, check=check)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show(rows)
    _show_set_aside(run)
    return 1 if any(row.verified.startswith("bad") for row in rows) else 0


def _refuse_unknown(there: dict[int, Path], steps: Sequence[int]) -> None:
    unknown = [str(step) for step in steps if step not in there]
    if unknown:
        known = ", ".join(map(str, there)) or "none"
        raise LaunchError(f"there is no checkpoint of step {', '.join(unknown)}; there are: {known}.")


def _delete(there: dict[int, Path], steps: Sequence[int]) -> None:
    """Remove the checkpoints of `steps`; of those that are whole enough stay, bad ones may always go."""
    pinned = [str(step) for step in steps if is_pinned(there[step])]
    if pinned:
        raise LaunchError(f"step {', '.join(pinned)} is pinned; --unpin it first.")
    going = dict.fromkeys(steps)
    if any(_is_whole(there[step]) for step in going):
        staying = [folder for step, folder in reversed(there.items()) if step not in going]
        whole = list(islice(filter(_is_whole, staying), _FEWEST))
        if len(whole) < _FEWEST:
            raise LaunchError(
                f"{len(whole)} of the checkpoints that would stay are whole; at least {_FEWEST} stay. To "
                "give the run up, delete its folder."
            )
    for step in going:
        _remove(there[step])


def _remove(folder: Path) -> None:
    # Renamed first, as in gpt.checkpoint.writer: no half of a committed folder, whatever is killed.
    trash = folder.with_name(f"{UNCOMMITTED_PREFIX}pruned-{folder.name}")
    folder.rename(trash)
    fsync_folder(folder.parent)
    shutil.rmtree(trash)


def _set_aside(run: RunDir) -> list[Path]:
    """What stands beside the checkpoints and counts no more: bad ones, and those of a course that is left."""
    return sorted(run.checkpoints.glob(".b*-step-*"))


def _delete_set_aside(run: RunDir) -> None:
    """Remove what was set aside, and say so; a pin counts for what bears it there too."""
    folders = _set_aside(run)
    pinned = [folder for folder in folders if is_pinned(folder)]
    if pinned:
        pins = ", ".join(str(folder / PIN_NAME) for folder in pinned)
        raise LaunchError(f"pinned before it was set aside, so that nothing is deleted: remove {pins} first.")
    for folder in folders:
        freed = size(_bytes_in(folder))
        _remove(folder)
        click.echo(f"deleted: {folder}, {freed}", err=True)
    if not folders:
        click.echo(f"nothing is set aside in {run.checkpoints}", err=True)


def _is_whole(folder: Path) -> bool:
    return next(verify(folder), None) is None


def _list(run: RunDir, *, check: bool) -> list[Listed]:
    losses = record.val_losses(run.metrics)
    read_back = {line["step"] for line in record.read(run.events) if line["event"] == Event.CHECKPOINT_SAVED}
    rows = []
    for step, folder in committed(run.checkpoints):
        with suppress(FileNotFoundError):  # pruned meanwhile
            rows.append(_listed(step, folder, losses.get(step), is_read_back=step in read_back, check=check))
    return rows


def _listed(step: int, folder: Path, val_loss: float | None, *, is_read_back: bool, check: bool) -> Listed:
    verified = "when saved" if is_read_back else "not yet"
    world_size = stage = None
    try:
        index = read_index(folder)
        world_size, stage = index.world_size, index.stage
    except Corrupt as error:
        verified = f"bad: {error.bad.path.name}: {error.bad.reason}"
    else:
        if check:
            bad = next(verify(folder), None)
            verified = "now" if bad is None else f"bad: {bad.path.name}: {bad.reason}"
    return Listed(
        step=step,
        size_bytes=_bytes_in(folder),
        saved_at=folder.stat().st_mtime,
        world_size=world_size,
        stage=stage,
        verified=verified,
        is_pinned=is_pinned(folder),
        val_loss=val_loss,
    )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _show_set_aside(run: RunDir) -> None:
    """Nothing removes it but the user."""
    for folder in _set_aside(run):
        with suppress(FileNotFoundError):
            freed = size(_bytes_in(folder))
            click.echo(f"set aside, until --delete-set-aside: {folder}, {freed}", err=True)


def _show(rows: Sequence[Listed]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "size", "saved", "processes", "stage", "val loss", "pinned", "verified"):
        is_text = heading in ("saved", "pinned", "verified")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.step),
            size(row.size_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row.saved_at)),
            str(row.world_size or "–"),
            str(row.stage or "–"),
            f"{row.val_loss:.4f}" if row.val_loss is not None else "–",
            "pinned" if row.is_pinned else "",
            row.verified,
        )
    console = Console()
    if not console.is_terminal:
        console.width = 180
    console.print(table)
