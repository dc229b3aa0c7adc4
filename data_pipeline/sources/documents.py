"""Documents out of files, in order, and what in them is broken.

A broken document is handed out as a BadDocument with its line and reason and never dropped in silence;
whoever reads decides. Compressed data that ends too early is broken too.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.remote import in_words, unreadable
from data_pipeline.sources.compression import DamagedError, decompress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource

_READ_BYTES = 1 << 20
# A .txt file is one document and is held in memory whole, as is its encoding.
_LARGEST_TEXT_BYTES = 1 << 30


class BadDocument(NamedTuple):
    """A document that cannot be used: `line` counts from 1 at the beginning of its span."""

    line: int
    reason: str


@dataclass(frozen=True)
class Span:
    """Part [start, stop) of a source: bytes of a file, rows or shards of a data set.

    Of a file of lines it holds the lines that begin there, each of them whole; of a Parquet file the row
    groups that begin there. A compressed file can only be read from its beginning: where it is read in
    several spans, `text` says which bytes of its text are this one's, to the end where the second is None.
    """

    source: SourceFile | RowSource
    start: int
    stop: int
    text: tuple[int, int | None] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the source in this span."""
        source = self.source
        return source.size_bytes * self.stop // max(1, source.units) - source.size_bytes * self.start // max(
            1, source.units
        )

    @property
    def lines(self) -> tuple[int, int | None]:
        """Between which bytes of the text the lines of this span begin."""
        if self.text is not None:
            return self.text
        is_cut = isinstance(self.source, SourceFile) and _is_plain_lines(self.source)
        return (self.start, self.stop) if is_cut else (0, None)


def _is_plain_lines(source: SourceFile) -> bool:
    """Whether it is cut by its own bytes, each of which is read once, in the span that it belongs to."""
    return source.suffix == ".jsonl"


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
    of the span the last document stands in; once all is read, `checksum` is xxh3_128 over the bytes of the
    span, or over the texts of a data set's rows or of a file in an object store, which is read but once.
    """

    def __init__(self, span: Span, text_field: str) -> None:
        self.bytes_read = 0
        self.line = 0
        self._span = span
        self._text_field = text_field
        self._sum = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[bytes | BadDocument]:
        source = self._span.source
        if isinstance(source, RowSource):
            return self._rows(source)
        return self._summed(self._file(source)) if source.is_remote else self._file(source)

    def _file(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        suffix = source.suffix
        if suffix == ".parquet":
            return self._parquet(source)
        # A span that starts inside the file begins one byte early: the line that this byte belongs to,
        # up to its newline, is the span's before.
        begin = max(0, self._span.start - 1) if _is_plain_lines(source) else 0
        chunks = decompress(self._raw(source, begin), suffix)
        return self._text(chunks) if suffix.startswith(".txt") else self._jsonl(chunks)

    @property
    def checksum(self) -> str:
        """xxh3_128 of what was read."""
        source = self._span.source
        if isinstance(source, RowSource) or source.is_remote or _is_plain_lines(source):
            return self._sum.hexdigest()
        return _checksum(source, self._span)

    def _raw(self, source: SourceFile, begin: int) -> Iterator[bytes]:
        start, stop = self._span.start, self._span.stop
        is_summed = _is_plain_lines(source) and not source.is_remote
        with source.open() as file:
            file.seek(begin)
            while chunk := _read(source, file):
                if is_summed and begin < stop:
                    self._sum.update(memoryview(chunk)[max(0, start - begin) : stop - begin])
                begin += len(chunk)
                self.bytes_read = min(max(0, begin - start), self._span.size_bytes)
                yield chunk

    def _jsonl(self, chunks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        start, stop = self._span.lines
        is_compressed = isinstance(self._span.source, SourceFile) and not _is_plain_lines(self._span.source)
        behind = 0 if is_compressed else max(0, start - 1)
        try:
            if is_compressed and start:
                behind, chunks = _skip(chunks, start - 1)
            for line in _lines(chunks):
                begin, behind = behind, behind + len(line)
                if begin < start:
                    continue
                if stop is not None and begin >= stop:
                    return
                self.line += 1
                if begin == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                document = _from_json(line, self._text_field)
                yield BadDocument(self.line, document) if isinstance(document, str) else document
        except DamagedError as error:
            if stop is None or self._span.text is None:  # of several spans the last one says it
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
        except DamagedError as error:
            yield BadDocument(1, str(error))
            return
        text = whole.getvalue().removeprefix(b"\xef\xbb\xbf")
        try:
            text.decode()
        except UnicodeDecodeError as error:
            yield BadDocument(1 + text.count(b"\n", 0, error.start), "not valid UTF-8")
            return
        yield text

    def _parquet(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        import pyarrow
        import pyarrow.parquet

        try:
            with _table(source) as table:
                names = table.schema_arrow.names
                if self._text_field not in names:
                    if self._span.start == 0:
                        yield BadDocument(1, f"no column {self._text_field!r}; it has {', '.join(names)}")
                    return
                groups = _row_groups(table.metadata, self._span.start, self._span.stop)
                sizes = [int(table.metadata.row_group(group).num_rows) for group in groups]
                for group, begin, size in zip(groups, accumulate(sizes, initial=0), sizes, strict=False):
                    try:
                        yield from self._row_group(table, group)
                    except (pyarrow.ArrowException, OSError) as error:
                        self._require_here(source, error)
                        yield BadDocument(
                            self.line + 1,
                            f"rows to the end of their group are unreadable: {_first_line(error)}",
                        )
                        self.line = begin + size
                    self.bytes_read = self._span.size_bytes * self.line // max(1, sum(sizes))
        except (pyarrow.ArrowException, OSError) as error:
            self._require_here(source, error)
            if self._span.start == 0:
                yield BadDocument(1, f"not a readable Parquet file: {_first_line(error)}")

    def _row_group(self, table: Any, group: int) -> Iterator[bytes | BadDocument]:
        batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=[self._text_field])
        for batch in batches:
            for value in batch.column(0):
                yield self._cell(value, self._text_field)

    def _require_here(self, source: SourceFile, error: Exception) -> None:
        """Raises DataError where `error` may be the store's and not the file's."""
        import pyarrow

        if source.is_remote and not isinstance(error, pyarrow.ArrowInvalid):
            raise unreadable(source.location, error) from error

    def _rows(self, source: RowSource) -> Iterator[bytes | BadDocument]:
        try:
            for value in source.values(self._span.start, self._span.stop):
                document = self._cell(value, source.text_field)
                self._add_to_sum(document)
                text = document if isinstance(document, bytes) else b""
                self.bytes_read = min(self._span.size_bytes, self.bytes_read + len(text))
                yield document
        except KeyError:
            yield BadDocument(self.line + 1, f"no column {source.text_field!r}")
        except Exception as error:  # of any library: of Arrow, of the files' compression, of the network
            # Not a broken document: the same rows may well be readable a minute later.
            raise DataError(
                f"{source.name}: reading {source.unit} {self._span.start} to {self._span.stop} failed: "
                f"{in_words(error)}. What is finished stays; run again to continue"
            ) from error

    def _summed(self, documents: Iterator[bytes | BadDocument]) -> Iterator[bytes | BadDocument]:
        for document in documents:
            self._add_to_sum(document)
            yield document

    def _add_to_sum(self, document: bytes | BadDocument) -> None:
        text = document if isinstance(document, bytes) else b""
        self._sum.update(b"%d " % len(text))
        self._sum.update(text)

    def _cell(self, value: Any, column: str) -> bytes | BadDocument:
        self.line += 1
        try:
            document = _from_value(value.as_py(), column)
        except UnicodeDecodeError:
            document = "not valid UTF-8"
        return BadDocument(self.line, document) if isinstance(document, str) else document


def place(span: Span, line: int) -> str:
    """`FILE:LINE` of line `line` of the span, lines and rows counted from 1."""
    source = span.source
    if isinstance(source, SourceFile):
        return f"{source.location}:{_lines_before(span, source) + line}"
    if source.is_streamed:
        return f"{source.name}, shards {span.start} to {span.stop}:{line}"
    return f"{source.name}:{span.start + line}"


@lru_cache(maxsize=8)  # many lines of one span are listed together
def _lines_before(span: Span, source: SourceFile) -> int:
    """How many lines, or rows, of the file come before the span."""
    if span.start == 0:
        return 0
    if source.suffix == ".parquet":
        with _table(source) as table:
            metadata = table.metadata
        groups = _row_groups(metadata, 0, span.start)
        return sum(int(metadata.row_group(group).num_rows) for group in groups)
    left = span.lines[0] - 1  # the byte before the span belongs to the last line before it
    newlines = 0
    with source.open() as file, suppress(DamagedError):
        for chunk in decompress(iter(lambda: _read(source, file), b""), source.suffix):
            newlines += chunk.count(b"\n", 0, max(0, left))
            left -= len(chunk)
            if left <= 0:
                break
    return newlines + 1


@contextmanager
def _table(source: SourceFile) -> Iterator[Any]:
    """A Parquet file; one that lies here is mapped by Arrow itself."""
    import pyarrow.parquet

    if not source.is_remote:
        with pyarrow.parquet.ParquetFile(source.location) as table:
            yield table
        return
    with source.open() as file, pyarrow.parquet.ParquetFile(file) as table:
        yield table


def _row_groups(metadata: Any, start: int, stop: int) -> list[int]:
    """The row groups that begin in [start, stop) of the file, the footer's first column deciding."""
    found = []
    for index in range(metadata.num_row_groups):
        column = metadata.row_group(index).column(0)
        begin = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
        if start <= begin < stop:
            found.append(index)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(source: SourceFile, file: BinaryIO) -> bytes:
    """The next bytes of a source, nothing at its end; a store that fails is an error of ours."""
    try:
        return file.read(_READ_BYTES)
    except Exception as error:
        if source.is_remote:
            raise unreadable(source.location, error) from error
        raise


def _checksum(source: SourceFile, span: Span) -> str:
    digest = xxhash.xxh3_128()
    left = span.stop - span.start
    with source.open() as file:
        file.seek(span.start)
        while left and (block := file.read(min(left, _READ_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _skip(chunks: Iterable[bytes], size: int) -> tuple[int, Iterator[bytes]]:
    """The chunks from the one that holds byte `size` on, and how many bytes were passed over."""
    behind = 0
    rest = iter(chunks)
    for chunk in rest:
        if behind + len(chunk) > size:
            return behind, itertools.chain([chunk], rest)
        behind += len(chunk)
    return behind, iter(())


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
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


def _from_json(line: bytes, text_field: str) -> bytes | str:
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
