"""metrics.jsonl and events.jsonl: append, cut back, read.

The record is the truth about a run; MLflow mirrors it. One JSON object a line; each line is one write, so
that a kill can tear the last line only, and readers pass over a torn last line.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, /, **fields: Any) -> None:
    """Add one line with the time (Unix seconds) first."""
    line = json.dumps({"time": time.time(), **fields}, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def event(path: Path, event_name: str, /, **fields: Any) -> None:
    """Add an event to events.jsonl at `path`."""
    append(path, event=event_name, **fields)


def read(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The whole lines of `path` from byte `offset`; a torn last line and a missing file give nothing."""
    for line, _ in read_from(path, offset):
        yield line


def read_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line from byte `offset` and the offset behind it, for a reader that comes back later."""
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


def last(path: Path, tail_bytes: int = 65536) -> dict[str, Any] | None:
    """The last whole line, reading no more than `tail_bytes`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    start = max(0, size - tail_bytes)
    content = None
    for content in read(path, start):  # noqa: B007
        pass
    return content


def cut_back(path: Path, step: int) -> None:
    """Drop a torn last line and every line past `step`, so that each step stands in the record once."""
    if not path.exists():
        return
    keep = 0
    for line, offset in read_from(path, 0):
        if line["step"] > step:
            break
        keep = offset
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make what was appended to `path` durable."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
