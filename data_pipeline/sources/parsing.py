"""Turns lines and values into documents: UTF-8 bytes, or the reason why there are none.

The reasons are counted in a data set's manifest, so their wording is part of the manifest's content.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator

import orjson


def skip_blocks(blocks: Iterable[bytes], size: int) -> tuple[int, Iterator[bytes]]:
    """The number of bytes skipped, and the blocks from the one that contains byte `size` onwards."""
    skipped = 0
    rest = iter(blocks)
    for block in rest:
        if skipped + len(block) > size:
            return skipped, itertools.chain([block], rest)
        skipped += len(block)
    return skipped, iter(())


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields each line with its newline; the last line may lack one."""
    parts: list[bytes] = []
    for block in blocks:
        for line in io.BytesIO(block):  # several times as fast as block.split, and copies only once
            if not line.endswith(b"\n"):
                parts.append(line)
            elif parts:
                yield b"".join((*parts, line))
                parts.clear()
            else:
                yield line
    if parts:
        yield b"".join(parts)


def document_from_json(line: bytes, text_field: str) -> bytes | str:
    """The document in a JSON line, or the reason why there is none. An empty line is an empty document."""
    if not line or line.isspace():
        return b""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # orjson is stricter than JSON in use (NaN, lone surrogates), so Python's parser has the last say.
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            return "not valid UTF-8"
        except (ValueError, RecursionError):
            return "not valid JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    if text_field not in value:
        return f"no field {text_field!r}"
    return document_from_value(value[text_field], text_field)


def document_from_value(value: object, text_field: str) -> bytes | str:
    """The document in the value of a field or a column, or the reason why there is none."""
    if value is None:
        return f"{text_field!r} is null"
    if not isinstance(value, str):
        return f"{text_field!r} is {type(value).__name__}, not a string"
    try:
        return value.encode()
    except UnicodeEncodeError:
        return f"{text_field!r} holds half of a surrogate pair, which is not Unicode text"
