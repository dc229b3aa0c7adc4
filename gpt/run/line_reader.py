"""Reads JSONL files that another process appends to: whole at once, or only what is new.

A line that is torn, garbled or not an object is skipped, and so is a line that a checking function
refuses: one bad line never hides the others.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from gpt.run.json_file import open_regular, parse_json

Line = dict[str, Any]
# Returns a line with the values that are as they should be, or None when the line is of no use.
Check = Callable[[Line], Line | None]

LONGEST_LINE_BYTES = 1 << 24  # a longer line is none of ours, and may not fit into memory
_TAIL_BYTES = 1 << 16  # some hundred steps


def raw_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The complete lines of `file` from its position, each with the offset after it.

    A line that is too long is empty here.
    """
    offset = file.tell()
    is_too_long = False
    while raw := file.readline(LONGEST_LINE_BYTES):
        offset += len(raw)
        if raw.endswith(b"\n"):
            yield b"" if is_too_long else raw, offset
            is_too_long = False
        elif len(raw) == LONGEST_LINE_BYTES:
            is_too_long = True
        else:
            return  # the last line is not complete yet


def object_of(raw: bytes) -> Line | None:
    """The object in one line; None when the line is torn, garbled or not an object."""
    try:
        content = parse_json(raw)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


class LineReader:
    """Reads what is appended to a JSONL file; only new bytes are parsed.

    A restart cuts the record back and appends other lines, and the last line may be amended. The reader
    notices both and continues at the first line that changed, so that the lines it hands out last are those
    of the file. It remembers 16 bytes for each line.
    """

    def __init__(self, path: Path, check: Check, *, from_end: bool = False) -> None:
        """`from_end` passes over the lines that are in the file now."""
        self._path, self._check = path, check
        self._first, self._ends, self._hashes = 0, array("Q"), array("q")
        if from_end:
            self._pass_over_tail()
        self._read = len(self._ends)

    def unread(self) -> Iterator[Line]:
        """The lines since `mark_read` was last called, as far as they are complete now; checked."""
        del self._ends[self._read :], self._hashes[self._read :]
        try:
            file = open_regular(self._path)
        except FileNotFoundError:
            return
        with file:
            self._forget_changed(file)
            file.seek(self._end_of(len(self._ends)))
            for raw, end in raw_lines(file):
                self._ends.append(end)
                self._hashes.append(hash(raw))
                content = object_of(raw)
                if content is not None and (line := self._check(content)) is not None:
                    yield line

    def mark_read(self) -> None:
        """Pass over the lines that `unread` has yielded; without this call it yields them again."""
        self._read = len(self._ends)

    def _pass_over_tail(self) -> None:
        """Remember the last lines of the file: a restart may cut the record back to one of them."""
        with suppress(FileNotFoundError), open_regular(self._path) as file:
            self._first = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(self._first)
            for raw, end in raw_lines(file):
                self._ends.append(end)
                self._hashes.append(hash(raw))

    def _forget_changed(self, file: BinaryIO) -> None:
        """Forget the lines from the first one that is no longer in the file as it was read."""
        same, end = 0, len(self._ends)  # the lines before `same` are unchanged, those from `end` on are not
        middle = end - 1  # the usual case is that nothing has changed
        while same < end:
            if self._is_unchanged(file, middle):
                same = middle + 1
            else:
                end = middle
            middle = (same + end) // 2
        del self._ends[same:], self._hashes[same:]
        self._read = same
        if not same:
            self._first = min(self._first, file.seek(0, os.SEEK_END))

    def _is_unchanged(self, file: BinaryIO, number: int) -> bool:
        start, end = self._end_of(number), self._ends[number]
        if self._hashes[number] == hash(b""):  # a line that was too long
            return file.seek(0, os.SEEK_END) >= end
        file.seek(start)
        return hash(file.read(end - start)) == self._hashes[number]

    def _end_of(self, count: int) -> int:
        """The offset after the first `count` lines."""
        return self._ends[count - 1] if count else self._first
