"""The few lines of a run's record that a summary needs, found without parsing the others.

`outlast status` shows a hundred runs at once, and parsing every line of their records would take seconds.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.run import record
from gpt.run.events import Event, checked_event
from gpt.run.json_file import open_regular
from gpt.run.line_reader import object_of

_TAIL_BYTES = 1 << 18  # about a thousand steps


class EventIndex:
    """The events of a run by name; the file is read once, and only the requested lines are parsed."""

    def __init__(self, path: Path) -> None:
        self._content = b""
        with suppress(FileNotFoundError), open_regular(path) as file:
            self._content = file.read()

    def count(self, name: Event) -> int:
        """How many events have this name."""
        return sum(1 for _ in self.each(name))

    def each(self, *names: Event) -> Iterator[dict[str, Any]]:
        """The events that have one of these names, oldest first, as `checked_event` returns them."""
        starts = {self._content.rfind(b"\n", 0, at) + 1 for name in names for at in self._places(name)}
        for start in sorted(starts):
            yield from self._event(start, *names)

    def last(self, *names: Event) -> dict[str, Any]:
        """The newest event that has one of these names; empty if there is none."""
        end = len(self._content)
        while (at := max(self._content.rfind(_mark(name), 0, end) for name in names)) != -1:
            end = self._content.rfind(b"\n", 0, at) + 1
            for event in self._event(end, *names):
                return event
        return {}

    def _places(self, name: Event) -> Iterator[int]:
        """Where the name stands; perhaps as a value of another field."""
        mark = _mark(name)
        at = self._content.find(mark)
        while at != -1:
            yield at
            at = self._content.find(mark, at + 1)

    def _event(self, start: int, *names: Event) -> Iterator[dict[str, Any]]:
        """The event in the line at `start` if it has one of these names."""
        end = self._content.find(b"\n", start)
        event = checked_event(object_of(self._content[start : end if end != -1 else None]) or {})
        if event is not None and event["event"] in names:
            yield event


def _mark(name: Event) -> bytes:
    return f'"{name.value}"'.encode()


def last_metrics(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last complete line of metrics.jsonl, and the last one with a validation loss; empty if missing.

    Both are as `record.checked_step` returns them. Only the end of a long file is read, and only these two
    lines are parsed.
    """
    complete: list[bytes] = []
    with suppress(FileNotFoundError), open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        complete = file.read().split(b"\n")[:-1]
    newest: dict[str, Any] = {}
    for raw in reversed(complete):
        if newest and b'"val/loss"' not in raw:
            continue
        # None when a kill tore the line, or the read began in the middle of it
        line = record.checked_step(object_of(raw) or {})
        newest = newest or line or {}
        if line is not None and "val/loss" in line:
            return newest, line
    return newest or record.last(path) or {}, {}
