"""`outlast checkpoints`: lists, pins, deletes and verifies the checkpoints of a run."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import click

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import PIN_NAME, Corrupt, committed, is_pinned, read_index, verify
from gpt.checkpoint.patience import Unreadable
from gpt.checkpoint.removal import delete as delete_checkpoint
from gpt.checkpoint.removal import rejected_or_rewound
from gpt.run import record
from gpt.run.events import Event, read_events
from gpt.run.run_dir import RunDir
from launcher.units import one_line, size

_HEADINGS = ("step", "size", "saved", "processes", "stage", "val loss", "pinned", "verified")
_LEFT_ALIGNED = ("saved", "pinned", "verified")
_FEWEST = 2  # the newest, and one more in case the newest turns out to be corrupt


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
    """Pin, unpin and delete, then list; 1 when `check`, which verifies every byte, finds a corrupt one."""
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
        raise LaunchError(f"there is no checkpoint of step {', '.join(unknown)}. Available steps: {known}.")


def _delete(there: dict[int, Path], steps: Sequence[int]) -> None:
    """Delete the checkpoints of `steps`. Corrupt ones can always go; _FEWEST intact ones must remain."""
    pinned = [str(step) for step in steps if is_pinned(there[step])]
    if pinned:
        raise LaunchError(f"step {', '.join(pinned)} is pinned. Use --unpin first.")
    going = dict.fromkeys(steps)
    if any(_is_intact(there[step]) for step in going):
        staying = [folder for step, folder in reversed(there.items()) if step not in going]
        intact = list(islice(filter(_is_intact, staying), _FEWEST))
        if len(intact) < _FEWEST:
            raise LaunchError(
                f"only {len(intact)} intact checkpoints would remain; at least {_FEWEST} must. To delete the "
                "whole run, delete its folder."
            )
    for step in going:
        delete_checkpoint(there[step])


def _delete_set_aside(run: RunDir) -> None:
    """Delete the folders that were set aside, unless one of them is pinned."""
    folders = rejected_or_rewound(run.checkpoints)
    pinned = [folder for folder in folders if is_pinned(folder)]
    if pinned:
        pins = ", ".join(str(folder / PIN_NAME) for folder in pinned)
        raise LaunchError(f"nothing was deleted: a folder that was set aside is pinned. Remove {pins} first.")
    for folder in folders:
        freed = size(_bytes_in(folder))
        delete_checkpoint(folder)
        click.echo(f"deleted: {folder}, {freed}", err=True)
    if not folders:
        click.echo(f"no checkpoints are set aside in {run.checkpoints}", err=True)


def _is_intact(folder: Path) -> bool:
    return next(verify(folder), None) is None


def _list(run: RunDir, *, check: bool) -> list[Listed]:
    losses = record.val_losses(run.metrics)
    read_back = {event["step"] for event in read_events(run.events, Event.CHECKPOINT_SAVED)}
    rows = []
    for step, folder in committed(run.checkpoints):
        loss = losses.get(step)
        try:
            rows.append(_listed(step, folder, loss, is_read_back=step in read_back, check=check))
        except FileNotFoundError:
            continue  # it was pruned meanwhile
        except (OSError, Unreadable) as error:
            reason = f"bad: {error}"
            rows.append(Listed(step, 0, folder.stat().st_mtime, None, None, reason, False, loss))
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
    with os.scandir(folder) as files:
        return sum(file.stat().st_size for file in files)


def _show_set_aside(run: RunDir) -> None:
    """Name the folders that were set aside; only the user deletes them."""
    for folder in rejected_or_rewound(run.checkpoints):
        with suppress(FileNotFoundError):
            freed = size(_bytes_in(folder))
            click.echo(f"set aside ({freed}): {folder}; --delete-set-aside deletes it", err=True)


def _show(rows: Sequence[Listed]) -> None:
    """Print the rows as a table. Not with rich, which takes a millisecond a row."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = (
        "  ".join(
            cell.ljust(width) if heading in _LEFT_ALIGNED else cell.rjust(width)
            for heading, cell, width in zip(_HEADINGS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
    click.echo("\n".join(text))


def _cells(row: Listed) -> tuple[str, ...]:
    return (
        str(row.step),
        size(row.size_bytes),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(row.saved_at)),
        str(row.world_size or "–"),
        str(row.stage or "–"),
        f"{row.val_loss:.4f}" if row.val_loss is not None else "–",
        "pinned" if row.is_pinned else "",
        one_line(row.verified),
    )
