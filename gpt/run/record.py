"""metrics.jsonl and events.jsonl: append lines, cut them back, read them.

The record is the authoritative account of a run; MLflow receives a copy. It has one JSON object per line.
Each line is a single write, so a kill can tear only the last line, and readers ignore a torn last line.
Every reader of metrics.jsonl gets its lines through `checked_step`.
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
from gpt.run.json_file import open_regular
from gpt.run.line_reader import Line, object_of, raw_lines

_TAIL_BYTES = 1 << 16  # some hundred steps
_LARGEST_COUNT = 2**63 - 1
_LATEST_TIME = 1e11  # Unix seconds, in the year 5138


def append(path: Path, /, **fields: Any) -> None:
    """Append one line, with the time in Unix seconds first. A number that is not finite becomes null.

    If a kill has torn the last line, a line break ends it first. Raises OSError when the disk is full;
    nothing is appended then.
    """
    content = {"time": time.time(), **_finite_or_null(fields)}
    line = _encoded(content)
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


def is_count(value: object) -> bool:
    """Whether `value` is a whole number that is not negative and fits into 63 bits, such as a step."""
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def is_number(value: object) -> bool:
    """Whether `value` is a finite number; whole numbers must fit into 63 bits."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and -_LARGEST_COUNT <= value <= _LARGEST_COUNT


def is_time(value: object) -> bool:
    """Whether `value` can be a time in Unix seconds."""
    return type(value) in (int, float) and 0 <= value <= _LATEST_TIME  # type: ignore[operator]


def checked_step(line: Line) -> Line | None:
    """A line of metrics.jsonl with `step` and `time`; every other value is a finite number or None.

    None when the line has no usable step or time. None as a value means that the number was not finite.
    """
    if not is_count(line.get("step")) or not is_time(line.get("time")):
        return None
    return {name: value for name, value in line.items() if value is None or is_number(value)}


def read(path: Path) -> Iterator[Line]:
    """The objects in the complete lines of `path`, unchecked. A missing file has none."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for raw, _ in raw_lines(file):
            if (content := object_of(raw)) is not None:
                yield content


def read_steps(path: Path) -> Iterator[Line]:
    """The lines of the metrics.jsonl at `path`, as `checked_step` returns them."""
    for content in read(path):
        if (line := checked_step(content)) is not None:
            yield line


def val_losses(path: Path) -> dict[int, float]:
    """The validation loss of each step that has a finite one; only those lines are parsed."""
    losses = {}
    with suppress(FileNotFoundError), open_regular(path) as file:
        for raw, _ in raw_lines(file):
            line = checked_step(object_of(raw) or {}) if b'"val/loss"' in raw else None
            if line is not None and line.get("val/loss") is not None:
                losses[int(line["step"])] = float(line["val/loss"])
    return losses


def last(path: Path) -> Line | None:
    """The last line of the metrics.jsonl at `path`, as `checked_step` returns it; None without one."""
    for tail_bytes in (_TAIL_BYTES, None):  # the whole file only when its end holds no line
        newest = None
        for newest in _tail(path, tail_bytes):  # noqa: B007
            pass
        if newest is not None:
            return newest
    return None


def _tail(path: Path, tail_bytes: int | None) -> Iterator[Line]:
    """The lines in the last `tail_bytes` of the metrics.jsonl at `path`, or all of them."""
    with suppress(FileNotFoundError), open_regular(path) as file:
        if tail_bytes is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - tail_bytes))
        for raw, _ in raw_lines(file):
            if (line := checked_step(object_of(raw) or {})) is not None:
                yield line


def cut_back(path: Path, step: int) -> str | None:
    """Remove a torn last line and every line after `step`, so that no step is recorded twice.

    A line of a later step that stands between lines of earlier steps does not end the record: it is
    overwritten with spaces. Returns what is wrong with the remaining lines (missing or repeated steps, lines
    without a step) as a sentence, or None.
    """
    if not path.exists():
        return None
    keep, before, complaint, end = 0, None, None, 0
    misplaced: list[tuple[int, int]] = []
    with open_regular(path) as file:
        for raw, offset in raw_lines(file):
            start, end = end, offset
            content = object_of(raw)
            if content is None:
                continue  # a line torn by a kill and appended to by the next attempt
            if (line := checked_step(content)) is None:
                complaint = complaint or f"a line before byte {end} has no step or no time"
                continue
            here = int(line["step"])
            if here > step:
                if here == (before or 0) + 1:
                    break
                misplaced.append((start, end))
                continue
            if before is not None and here != before + 1:
                complaint = complaint or f"step {here} follows step {before}"
            before, keep = here, end
    misplaced = [(start, end) for start, end in misplaced if end <= keep]
    if misplaced:
        complaint = complaint or f"the line before byte {misplaced[0][1]} is of a later step"
    if before is not None and before != step:
        complaint = complaint or f"it ends at step {before}, the run continues from step {step}"
    with path.open("r+b") as target:
        for start, end in misplaced:
            target.seek(start)
            target.write(b" " * (end - start - 1))
        target.truncate(keep)
        fsync_file(target)
    return complaint


def amend_last(path: Path, /, **fields: Any) -> None:
    """Add fields to the last line with a single write, so a reader finds the old line or the new one."""
    with path.open("r+b", buffering=0) as file:
        size, tail_bytes = file.seek(0, os.SEEK_END), _TAIL_BYTES
        while True:
            file.seek(max(0, size - tail_bytes))
            content = file.read()
            start = content.rfind(b"\n", 0, -1) + 1
            if start or tail_bytes >= size:
                break
            tail_bytes *= 16
        line = {**json.loads(content[start:]), **_finite_or_null(fields)}
        file.seek(size - len(content) + start)
        file.write(_encoded(line))


def _encoded(content: Line) -> bytes:
    # A name that is not UTF-8 has surrogates in Python; as escapes they are valid in JSON.
    return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def _finite_or_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: None if _is_not_finite(value) else value for name, value in fields.items()}


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def sync(path: Path) -> None:
    """Make what was appended to `path` durable."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        fsync_file(file)
