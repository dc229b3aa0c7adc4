"""Documents out of files, in order, and what in them is broken.

A broken document is handed out as a BadDocument with its line and reason and never dropped in silence;
whoever reads decides. Compressed data that ends too early is broken too.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from data_pipeline.sources import SourceFile

_READ_BYTES = 1 << 20
# Compressed data are handed to the decompressor in parts of this size: all that a part holds comes at once.
_INFLATE_BYTES = 1 << 15
# A .txt file is one document and is held in memory whole, as is its encoding.
_LARGEST_TEXT_BYTES = 1 << 30


class BadDocument(NamedTuple):
    """A document that cannot be used: `line` counts from 1 at the beginning of its span."""

    line: int
    reason: str


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file: the lines that begin there, each of them whole."""

    file: SourceFile
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the file in this span."""
        return self.stop - self.start


def packaged_corpus() -> Path:
    """The corpus that ships with the project, a .jsonl.gz; its README.md states source and status."""
    return Path(str(resources.files("data_pipeline.corpus") / "kjv.jsonl.gz"))


def is_held_out(text: bytes, val_fraction: float, seed: int) -> bool:
    """Whether the document belongs to the validation split.

    Decided by the document's own hash, so that the split is stable when the corpus grows, and a smaller
    fraction is part of a larger one.
    """
    return xxhash.xxh3_64_intdigest(text, seed) < val_fraction * 2.0**64


class DocumentReader:
    """The documents of a span in order, as UTF-8 bytes, and a BadDocument for each that is broken.

    An empty document comes as b"". `bytes_read` tells how far into the span it has come, `line` which line
    of the span the last document stands in.
    """

    def __init__(self, span: Span, text_field: str) -> None:
        self.bytes_read = 0
        self.line = 0
        self._span = span
        self._text_field = text_field

    def __iter__(self) -> Iterator[bytes | BadDocument]:
        suffix = self._span.file.suffix
        if suffix == ".parquet":
            return self._parquet()
        documents = self._text if suffix.startswith(".txt") else self._jsonl
        if suffix.endswith(".gz"):
            return documents(_gunzip(self._raw()))
        if suffix.endswith(".zst"):
            return documents(_unzstd(self._raw()))
        return documents(self._raw())

    def _raw(self) -> Iterator[bytes]:
        # A span that starts inside the file begins one byte early: the line that this byte belongs to,
        # up to its newline, is the span's before.
        with self._span.file.path.open("rb") as file:
            file.seek(max(0, self._span.start - 1))
            while chunk := file.read(_READ_BYTES):
                self.bytes_read = min(self.bytes_read + len(chunk), self._span.size_bytes)
                yield chunk

    def _jsonl(self, chunks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        start = self._span.start
        # Only plain lines are cut, so only there do offsets in the stream mean offsets in the file.
        stop = self._span.stop if self._span.file.is_divisible else None
        behind = max(0, start - 1)
        try:
            for line in _lines(chunks):
                begin, behind = behind, behind + len(line) + 1
                if begin < start:
                    continue
                if stop is not None and begin >= stop:
                    return
                self.line += 1
                if begin == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                document = _from_json(line, self._text_field)
                yield BadDocument(self.line, document) if isinstance(document, str) else document
        except _DamagedError as error:
            yield BadDocument(self.line + 1, str(error))

    def _text(self, chunks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        whole = io.BytesIO()
        self.line = 1
        try:
            for chunk in chunks:
                whole.write(chunk)
                if whole.tell() > _LARGEST_TEXT_BYTES:
                    yield BadDocument(1, "a text file is one document, and this one has more than 1 GiB")
                    return
        except _DamagedError as error:
            yield BadDocument(1, str(error))
            return
        text = whole.getvalue().removeprefix(b"\xef\xbb\xbf")
        try:
            text.decode()
        except UnicodeDecodeError as error:
            yield BadDocument(1 + text.count(b"\n", 0, error.start), "not valid UTF-8")
            return
        yield text

    def _parquet(self) -> Iterator[bytes | BadDocument]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._span.file.path) as table:
                names = table.schema_arrow.names
                if self._text_field not in names:
                    yield BadDocument(1, f"no column {self._text_field!r}; it has {', '.join(names)}")
                    return
                rows = table.metadata.num_rows
                for batch in table.iter_batches(batch_size=1024, columns=[self._text_field]):
                    for value in batch.column(0):
                        self.line += 1
                        try:
                            document = _from_value(value.as_py(), self._text_field)
                        except UnicodeDecodeError:
                            document = "not valid UTF-8"
                        yield BadDocument(self.line, document) if isinstance(document, str) else document
                    self.bytes_read = self._span.size_bytes * self.line // max(1, rows)
        except (pyarrow.ArrowException, OSError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            yield BadDocument(self.line + 1, f"not a readable Parquet file: {first_line}")


def line_number(span: Span, line: int) -> int:
    """The line of the file, from 1, that is `line` of the span."""
    if span.start == 0:
        return line
    newlines = 0
    left = span.start - 1
    with span.file.path.open("rb") as file:
        while left and (chunk := file.read(min(left, _READ_BYTES))):
            newlines += chunk.count(b"\n")
            left -= len(chunk)
    return newlines + 1 + line


class _Decompressor(Protocol):
    """What zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


class _DamagedError(Exception):
    """Compressed data that does not decompress, or ends too early."""


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        if whole:
            whole[0] = b"".join((*parts, whole[0]))
            parts.clear()
            yield from whole
        parts.append(rest)
    last = b"".join(parts)
    if last:
        yield last


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    return _inflate(chunks, lambda: zlib.decompressobj(wbits=31), "gzip")


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    # Not zstandard's stream reader: it takes a file that was cut short for a whole one.
    decompressor = zstandard.ZstdDecompressor()
    return _inflate(chunks, lambda: decompressor.decompressobj(), "zstd")


def _inflate(chunks: Iterable[bytes], member: Callable[[], _Decompressor], kind: str) -> Iterator[bytes]:
    """Decompressed chunks of a file of one or more members, which must be whole."""
    import zstandard

    current: _Decompressor | None = None
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), _INFLATE_BYTES):
                part = chunk[start : start + _INFLATE_BYTES]
                while part:
                    if current is None:
                        current = member()
                    if plain := current.decompress(part):
                        yield plain
                    if not current.eof:
                        break
                    part, current = current.unused_data, None
    except (zlib.error, zstandard.ZstdError) as error:
        raise _DamagedError(f"damaged {kind} data: {error}") from None
    if current is not None:
        raise _DamagedError(f"the {kind} data end too early: the file was cut short")


def _from_json(line: bytes, text_field: str) -> bytes | str:
    """The document in `line`, or the reason why there is none."""
    if not line.strip():
        return b""
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
    return _from_value(value[text_field], text_field)


def _from_value(value: object, text_field: str) -> bytes | str:
    if value is None:
        return f"{text_field!r} is null"
    if not isinstance(value, str):
        return f"{text_field!r} is {type(value).__name__}, not a string"
    try:
        return value.encode()
    except UnicodeEncodeError:
        return f"{text_field!r} holds half of a surrogate pair, which is not Unicode text"
