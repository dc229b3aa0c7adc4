"""The few lines of a run's record that a summary needs, found without parsing the others.

`outlast status` shows a hundred runs at once, and parsing every line of their records would take seconds.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.run.events import Event

_TAIL_BYTES = 1 << 18  # about a thousand steps


class EventIndex:
    """The events of a run by name; the file is read once, and only the requested lines are parsed."""

    def __init__(self, path: Path) -> None:
        try:
            self._content = path.read_bytes()
        except FileNotFoundError:
            self._content = b""

    def count(self, name: Event) -> int:
        """How many events have this name."""
        return self._content.count(_mark(name))

    def each(self, name: Event) -> Iterator[dict[str, Any]]:
        """The events of this name, oldest first."""
        at = self._content.find(_mark(name))
        while at != -1:
            yield from self._line(at)
            at = self._content.find(_mark(name), at + 1)

    def last(self, *names: Event) -> dict[str, Any]:
        """The newest event that has one of these names; empty if there is none."""
        at = max(self._content.rfind(_mark(name)) for name in names)
        return next(self._line(at), {}) if at != -1 else {}

    def _line(self, at: int) -> Iterator[dict[str, Any]]:
        start, end = self._content.rfind(b"\n", 0, at) + 1, self._content.find(b"\n", at)
        with suppress(ValueError):  # a kill tore the line
            yield json.loads(self._content[start : end if end != -1 else None])


def _mark(name: Event) -> bytes:
    return f'"event": "{name.value}"'.encode()


def last_metrics(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last complete line of metrics.jsonl, and the last one with a validation loss; empty if missing.

    Only the end of a long file is read, and only these two lines are parsed.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            complete = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}, {}
    newest: dict[str, Any] = {}
    for raw in reversed(complete):
        if newest and b'"val/loss"' not in raw:
            continue
        try:
            line = json.loads(raw)
        except ValueError:
            continue  # a kill tore the line, or the read began in the middle of it
        if not isinstance(line, dict):
            continue
        newest = newest or line
        if "val/loss" in line:
            return newest, line
    return newest, {}
