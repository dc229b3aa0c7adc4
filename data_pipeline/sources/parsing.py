"""Turns lines and values into documents: UTF-8 bytes, or the reason why there are none.

The reasons are counted in a data set's manifest, so their wording is part of the manifest's content.
"""

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import orjson

# A line or a document is held in memory. Anything larger is skipped and reported.
LARGEST_DOCUMENT_BYTES = 1 << 30
TOO_LARGE = "it has more than 1 GiB, the most that one line or document may have"


class Broken(NamedTuple):
    """The reason why there is no document, and the column of the line at which it was found, from 1."""

    reason: str
    column: int | None = None


class TooLong(int):
    """The size in bytes of a line that is too long to hold in memory."""


def skip_blocks(blocks: Iterable[bytes], size: int) -> tuple[int, Iterator[bytes]]:
    """The number of bytes skipped, and the blocks from the one that contains byte `size` onwards."""
    skipped = 0
    rest = iter(blocks)
    for block in rest:
        if skipped + len(block) > size:
            return skipped, itertools.chain([block], rest)
        skipped += len(block)
    return skipped, iter(())


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes | TooLong]:
    """Yields each line with its newline; the last line may lack one.

    A line of more than LARGEST_DOCUMENT_BYTES is not held in memory: only its size is yielded.
    """
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        for line in io.BytesIO(block):  # several times as fast as block.split, and copies only once
            if not parts and not size and line.endswith(b"\n"):
                yield line
                continue
            size += len(line)
            if size > LARGEST_DOCUMENT_BYTES:
                parts.clear()
            else:
                parts.append(line)
            if line.endswith(b"\n"):
                yield b"".join(parts) if parts else TooLong(size)
                parts, size = [], 0
    if size:
        yield b"".join(parts) if parts else TooLong(size)


_STRUCTURE = re.compile(rb'["\\{}\[\],]')
_IN_STRING = re.compile(rb'["\\]')


def split_values(blocks: Iterable[bytes]) -> Iterator[bytes | TooLong]:
    """Yields the objects of JSON text: the elements of an array, or objects that follow each other.

    It only finds where a value ends; a value may still not be valid JSON. A value of more than
    LARGEST_DOCUMENT_BYTES is not held in memory: only its size is yielded.
    """
    value = bytearray()
    size = 0
    depth, base = 0, -1  # of brackets; values are at depth `base`, which the first bracket decides
    in_string = is_escaped = False
    for block in blocks:
        begin = position = 0
        if is_escaped:
            position, is_escaped = 1, False
        while match := (_IN_STRING if in_string else _STRUCTURE).search(block, position):
            sign, position = match[0], match.end()
            if sign == b"\\":
                if in_string:
                    is_escaped = position == len(block)
                    position += 1
                continue
            if sign == b'"':
                in_string = not in_string
                continue
            if base < 0:
                base = 1 if sign == b"[" else 0
                if base:
                    begin, depth = position, 1
                    continue
            if sign in b"{[":
                depth += 1
                continue
            if sign in b"}]":
                depth -= 1
            is_end = sign == b"," if base else sign in b"}]"
            if (is_end and depth == base) or depth < base:
                part = block[begin : position - (1 if base else 0)]
                size += len(part)
                value += part
                if size > LARGEST_DOCUMENT_BYTES:
                    yield TooLong(size)
                elif value.strip():
                    yield bytes(value)
                value, size, begin = bytearray(), 0, position
                if depth < base:
                    base = depth = 0  # after the array, anything but whitespace is not JSON
        size += len(block) - begin
        if size > LARGEST_DOCUMENT_BYTES:
            value.clear()
        else:
            value += block[begin:]
    if size > LARGEST_DOCUMENT_BYTES:
        yield TooLong(size)
    elif value.strip():
        yield bytes(value)
    elif base == 1:
        yield b"["  # the array has no end


def split_text(blocks: Iterable[bytes], separator: bytes) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yields the line at which each document of a text begins, counted from 1, and the document.

    Documents are separated by `separator`. A separator that has a line of its own takes that line with it.
    Nothing is yielded for an empty text before the first or after the last separator.
    """
    buffer = bytearray()
    skipped = 0  # the bytes of a document that is too long
    line, is_line_start, has_begun = 1, True, False
    rest = iter(blocks)
    is_last = False
    while not is_last:
        block = next(rest, None)
        is_last = block is None
        buffer += block or b""
        start = 0
        while (found := buffer.find(separator, start)) >= 0:
            after = found + len(separator)
            if not is_last and after + 2 > len(buffer):
                break  # the line break after the separator may be in the next block
            document = bytes(buffer[start:found])
            if has_begun or document or skipped:
                yield line, TooLong(skipped + len(document)) if skipped else document
            has_begun = True
            line += (document + separator).count(b"\n")
            owns_line = buffer[found - 1 : found] == b"\n" if found else is_line_start
            for ending in (b"\r\n", b"\n"):
                if owns_line and buffer.startswith(ending, after):
                    after, line = after + len(ending), line + 1
                    break
            is_line_start = buffer[after - 1 : after] == b"\n"
            start, skipped = after, 0
        del buffer[:start]
        if len(buffer) > LARGEST_DOCUMENT_BYTES:
            keep = len(separator) + 1
            line += buffer.count(b"\n", 0, len(buffer) - keep)
            skipped += len(buffer) - keep
            del buffer[:-keep]
    if skipped or buffer:
        yield line, TooLong(skipped + len(buffer)) if skipped else bytes(buffer)


def document_from_json(line: bytes, text_field: str) -> bytes | Broken:
    """The document in a JSON line, or the reason why there is none. An empty line is an empty document.

    `text_field` names a key, or else the path to a key of nested objects, separated by dots.
    """
    if not line or line.isspace():
        return b""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # orjson is stricter than JSON in use (NaN, lone surrogates, depth), so Python's parser decides.
        try:
            value = json.loads(line.rstrip(b"\r\n").decode(), parse_int=_ignore_integer)
        except UnicodeDecodeError as error:
            return Broken("not valid UTF-8", error.start + 1)
        except json.JSONDecodeError as error:
            return Broken(f"not valid JSON: {error.msg}", error.pos + 1)
        except RecursionError:
            return Broken("JSON that is nested too deeply to be read")
    if not isinstance(value, dict):
        return Broken("not a JSON object")
    if text_field not in value:
        for key in text_field.split("."):
            if not isinstance(value, dict) or key not in value:
                return Broken(f"no field {text_field!r}")
            value = value[key]
        return document_from_value(value, text_field)
    return document_from_value(value[text_field], text_field)


def _ignore_integer(digits: str) -> int:
    # Python refuses integers of more than 4,300 digits. The value of an integer is never used.
    return int(digits[:20])


def document_from_value(value: object, text_field: str) -> bytes | Broken:
    """The document in the value of a field or a column, or the reason why there is none."""
    if value is None:
        return Broken(f"{text_field!r} is null")
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError:
            return Broken("not valid UTF-8")
        return value if len(value) <= LARGEST_DOCUMENT_BYTES else Broken(TOO_LARGE)
    if not isinstance(value, str):
        return Broken(f"{text_field!r} is {type(value).__name__}, not a string")
    try:
        document = value.encode()
    except UnicodeEncodeError:
        return Broken(f"{text_field!r} holds half of a surrogate pair, which is not Unicode text")
    return document if len(document) <= LARGEST_DOCUMENT_BYTES else Broken(TOO_LARGE)
