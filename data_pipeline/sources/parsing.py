"""Lines and values → the UTF-8 bytes of a document, or the reason why there is none."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator

import orjson


def skip(chunks: Iterable[bytes], size: int) -> tuple[int, Iterator[bytes]]:
    """The chunks from the one that holds byte `size` on, and how many bytes were passed over."""
    behind = 0
    rest = iter(chunks)
    for chunk in rest:
        if behind + len(chunk) > size:
            return behind, itertools.chain([chunk], rest)
        behind += len(chunk)
    return behind, iter(())


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Each line with its newline, which the last one may lack."""
    parts: list[bytes] = []
    for chunk in chunks:
        for line in io.BytesIO(chunk):  # several times as fast as chunk.split, and copied but once
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
    """The document in `line`, or the reason why there is none."""
    if not line or line.isspace():
        return b""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # It may only be too strict for orjson (NaN, half a surrogate pair): Python's parser says what it is.
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
    if value is None:
        return f"{text_field!r} is null"
    if not isinstance(value, str):
        return f"{text_field!r} is {type(value).__name__}, not a string"
    try:
        return value.encode()
    except UnicodeEncodeError:
        return f"{text_field!r} holds half of a surrogate pair, which is not Unicode text"
