"""metrics.jsonl and events.jsonl: append lines, cut them back, read them.

The record is the authoritative account of a run; MLflow receives a copy. It has one JSON object per line.
Each line is a single write, so a kill can tear only the last line, and readers ignore a torn last line.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.durable import fsync_file


def append(path: Path, /, **fields: Any) -> None:
    """Append one line, with the time in Unix seconds first. A number that is not finite becomes null.

    If a kill has torn the last line, a line break ends it first. Raises OSError when the disk is full;
    nothing is appended then.
    """
    content = {"time": time.time(), **_finite_or_null(fields)}
    line = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The complete lines of `path` from byte `offset`. A torn last line and a missing file are ignored."""
    for line, _ in read_from(path, offset):
        yield line


def read_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Each complete line from byte `offset`, with the offset after it, from which a reader can continue."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            try:
                content = json.loads(raw)
            except ValueError:
                continue  # a line torn by a kill and appended to by the next attempt
            if isinstance(content, dict):
                yield content, offset


def val_losses(path: Path) -> dict[int, float]:
    """The validation loss of each step that has one; only those lines are parsed."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    losses = {}
    for raw in lines:
        if b'"val/loss"' in raw:
            with suppress(ValueError, KeyError, TypeError):  # torn, or not finite
                line = json.loads(raw)
                losses[int(line["step"])] = float(line["val/loss"])
    return losses


def last(path: Path, tail_bytes: int = 65536) -> dict[str, Any] | None:
    """The last complete line, from the last `tail_bytes` of the file."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    start = max(0, size - tail_bytes)
    content = None
    for content in read(path, start):  # noqa: B007
        pass
    return content


def cut_back(path: Path, step: int) -> str | None:
    """Remove a torn last line and every line after `step`, so that no step is recorded twice.

    Returns what is wrong with the remaining lines (missing or repeated steps) as a sentence, or None.
    """
    if not path.exists():
        return None
    keep, before, complaint = 0, None, None
    for line, offset in read_from(path, 0):
        here = line.get("step")
        if not isinstance(here, int):
            complaint = complaint or f"a line before byte {offset} has no step"
            continue
        if here > step:
            break
        if before is not None and here != before + 1:
            complaint = complaint or f"step {here} follows step {before}"
        before, keep = here, offset
    if before is not None and before != step:
        complaint = complaint or f"it ends at step {before}, the run continues from step {step}"
    with path.open("r+b") as file:
        file.truncate(keep)
        fsync_file(file)
    return complaint


def amend_last(path: Path, /, **fields: Any) -> None:
    """Add fields to the last line with a single write, so a reader finds the old line or the new one."""
    with path.open("r+b", buffering=0) as file:
        content = file.read()
        start = content.rfind(b"\n", 0, -1) + 1
        line = {**json.loads(content[start:]), **_finite_or_null(fields)}
        file.seek(start)
        file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _finite_or_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: None if _is_not_finite(value) else value for name, value in fields.items()}


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def sync(path: Path) -> None:
    """Make what was appended to `path` durable."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        fsync_file(file)
