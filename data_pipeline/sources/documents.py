"""Reads the documents of a span, in order, and reports the broken ones.

The reader never drops a broken document silently: it returns a BadDocument with the line and the reason, and
the caller decides. Compressed data that ends too early counts as a broken document too.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain
from typing import Any, NamedTuple

import orjson
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.remote import in_words, unreadable
from data_pipeline.sources.compression import REST_LOST, DamagedError, decompress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.parquet import open_table, row_groups_within
from data_pipeline.sources.parsing import (
    LARGEST_DOCUMENT_BYTES,
    TOO_LARGE,
    Broken,
    TooLong,
    document_from_json,
    document_from_value,
    skip_blocks,
    split_lines,
    split_text,
    split_values,
)
from data_pipeline.sources.spans import Span, is_plain_lines

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The beginning of a .json file in which its first line is looked for.
_HEAD_BYTES = 1 << 24


class BadDocument(NamedTuple):
    """A document that cannot be used. `line` counts from 1 at the beginning of the span.

    `lost` is the number of documents that are left out for this reason.
    """

    line: int
    reason: str
    column: int | None = None
    lost: int = 1


class DocumentReader:
    """Iterates over the documents of a span: UTF-8 bytes, or a BadDocument for each broken one.

    An empty document is b"". A text file is one document, or several with `separator` between them.
    `bytes_read` is the progress within the span and `line` the span's line of the last document. After the
    iteration, `checksum` is the xxh3_128 of the span's bytes. Rows of a data set and files in an object store
    are read only once, so there it is the xxh3_128 of the documents' texts instead. Raises DataError if a
    local file changes while it is read.
    """

    def __init__(self, span: Span, text_field: str, separator: str | None = None) -> None:
        self.bytes_read = 0
        self.line = 0
        self._span = span
        self._text_field = text_field
        self._separator = separator.encode() if separator else None
        self._sum = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[bytes | BadDocument]:
        source = self._span.source
        if isinstance(source, RowSource):
            return self._rows(source)
        return self._summed(self._file(source)) if source.is_remote else self._watched(source)

    @property
    def checksum(self) -> str:
        """The xxh3_128 of the span; see the class."""
        source = self._span.source
        if isinstance(source, RowSource) or source.is_remote or is_plain_lines(source):
            return self._sum.hexdigest()
        with source.require_unchanged():
            return checksum_of_range(source, self._span.start, self._span.stop)

    def _watched(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        with source.require_unchanged():
            yield from self._file(source)

    def _file(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        if source.kind == "parquet":
            return self._parquet(source)
        if source.kind == "arrow":
            return self._arrow(source)
        # Reading starts one byte before the span: the line of that byte, up to its newline, belongs to the
        # span before.
        begin = max(0, self._span.start - 1) if is_plain_lines(source) else 0
        blocks = decompress(self._raw_blocks(source, begin), source.compression)
        if source.kind == "json":
            return self._json(blocks)
        if source.kind in ("csv", "tsv"):
            return self._csv(blocks, "," if source.kind == "csv" else "\t")
        if source.kind == "text":
            return self._text(blocks) if self._separator is None else self._texts(blocks, self._separator)
        return self._jsonl(blocks)

    def _raw_blocks(self, source: SourceFile, begin: int) -> Iterator[bytes]:
        start, stop = self._span.start, self._span.stop
        is_summed = is_plain_lines(source) and not source.is_remote
        for block in source.read_blocks(begin):
            if is_summed and begin < stop:
                self._sum.update(memoryview(block)[max(0, start - begin) : stop - begin])
            begin += len(block)
            self.bytes_read = min(max(0, begin - start), self._span.size_bytes)
            yield block

    def _jsonl(self, blocks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        start, stop = self._span.lines
        is_compressed = isinstance(self._span.source, SourceFile) and not is_plain_lines(self._span.source)
        end = 0 if is_compressed else max(0, start - 1)
        try:
            if is_compressed and start:
                end, blocks = skip_blocks(blocks, start - 1)
            for line in split_lines(blocks):
                begin, end = end, end + (line if isinstance(line, TooLong) else len(line))
                if begin < start:
                    continue
                if stop is not None and begin >= stop:
                    return
                if begin == 0 and not isinstance(line, TooLong):
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                yield self._json_value(line)
        except DamagedError as error:
            if stop is None or self._span.text is None:  # only the last of several spans reports it
                yield BadDocument(self.line + 1, f"{error}{REST_LOST}")

    def _json_value(self, value: bytes | TooLong) -> bytes | BadDocument:
        self.line += 1
        if isinstance(value, TooLong):
            return BadDocument(self.line, TOO_LARGE)
        return self._checked(document_from_json(value, self._text_field))

    def _checked(self, document: bytes | Broken) -> bytes | BadDocument:
        if isinstance(document, Broken):
            return BadDocument(self.line, document.reason, document.column)
        return document

    def _json(self, blocks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        """A .json file contains one object a line, as .jsonl does, or longer objects, or an array."""
        try:
            rest = iter(blocks)
            head = bytearray()
            while len(head) < _HEAD_BYTES and b"\n" not in head.lstrip() and (block := next(rest, b"")):
                head += block
            if head.startswith(_BYTE_ORDER_MARK):
                del head[: len(_BYTE_ORDER_MARK)]
            first = bytes(head).lstrip().partition(b"\n")[0]
            whole = chain([bytes(head)], rest)
            if not first.startswith(b"[") and _is_json(first):
                yield from map(self._json_value, split_lines(whole))
            else:
                yield from map(self._json_value, split_values(whole))
        except DamagedError as error:
            yield BadDocument(self.line + 1, f"{error}{REST_LOST}")

    def _csv(self, blocks: Iterable[bytes], delimiter: str) -> Iterator[bytes | BadDocument]:
        csv.field_size_limit(LARGEST_DOCUMENT_BYTES)
        rows = csv.reader(self._csv_lines(blocks), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if self._text_field not in names:
                lost = sum(1 for _ in _rows_of(rows))
                yield BadDocument(1, _no_column(self._text_field, names), lost=max(1, lost))
                return
            column = names.index(self._text_field)
            for row in _rows_of(rows):
                self.line += 1
                if isinstance(row, csv.Error):
                    yield BadDocument(self.line, f"not valid CSV: {row}")
                elif not row:
                    yield b""
                elif len(row) != len(names):
                    yield BadDocument(self.line, f"{len(row)} columns in a table of {len(names)}")
                else:
                    # bytes that are not UTF-8 were decoded as surrogates
                    text = row[column].encode(errors="surrogateescape")
                    yield self._checked(document_from_value(text, self._text_field))
        except csv.Error as error:
            yield BadDocument(1, f"not valid CSV: {error}{REST_LOST}")
        except DamagedError as error:
            yield BadDocument(self.line + 1, f"{error}{REST_LOST}")

    def _csv_lines(self, blocks: Iterable[bytes]) -> Iterator[str]:
        is_first = True
        for line in split_lines(blocks):
            if isinstance(line, TooLong):
                raise DamagedError(f"line {self.line + 1}: {TOO_LARGE}")
            if is_first:
                line, is_first = line.removeprefix(_BYTE_ORDER_MARK), False
            yield line.decode(errors="surrogateescape")

    def _text(self, blocks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        whole = io.BytesIO()
        self.line = 1
        try:
            for block in blocks:
                whole.write(block)
                if whole.tell() > LARGEST_DOCUMENT_BYTES:
                    yield BadDocument(
                        1,
                        "a text file is one document, and this one has more than 1 GiB. Give "
                        "document_separator if it contains several",
                    )
                    return
        except DamagedError as error:
            yield BadDocument(1, str(error))
            return
        yield self._checked_text(1, whole.getvalue().removeprefix(_BYTE_ORDER_MARK))

    def _texts(self, blocks: Iterable[bytes], separator: bytes) -> Iterator[bytes | BadDocument]:
        try:
            for line, text in split_text(blocks, separator):
                self.line = line
                if isinstance(text, TooLong):
                    yield BadDocument(line, TOO_LARGE)
                    continue
                yield self._checked_text(line, text.removeprefix(_BYTE_ORDER_MARK) if line == 1 else text)
        except DamagedError as error:
            yield BadDocument(self.line + 1, f"{error}{REST_LOST}")

    def _checked_text(self, line: int, text: bytes) -> bytes | BadDocument:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            start = text.rfind(b"\n", 0, error.start)
            return BadDocument(
                line + text.count(b"\n", 0, error.start), "not valid UTF-8", error.start - start
            )
        return text

    def _parquet(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        import pyarrow
        import pyarrow.parquet

        try:
            with open_table(source) as table:
                schema = table.schema_arrow
                path = _column_path(schema, self._text_field)
                if path is None:
                    rows = int(table.metadata.num_rows)
                    if self._span.start == 0 and rows:
                        yield BadDocument(1, _no_column(self._text_field, schema.names), lost=rows)
                    return
                groups = row_groups_within(table.metadata, self._span.start, self._span.stop)
                sizes = [int(table.metadata.row_group(group).num_rows) for group in groups]
                for group, begin, size in zip(groups, accumulate(sizes, initial=0), sizes, strict=False):
                    try:
                        batches = table.iter_batches(
                            batch_size=1024, row_groups=[group], columns=[self._text_field]
                        )
                        yield from self._cells(batches, path)
                    except (pyarrow.ArrowException, OSError) as error:
                        _raise_if_store_failed(source, error)
                        yield BadDocument(
                            self.line + 1,
                            f"rows to the end of their group are unreadable: {_first_line(error)}",
                            lost=max(1, begin + size - self.line),
                        )
                        self.line = begin + size
                    self.bytes_read = self._span.size_bytes * self.line // max(1, sum(sizes))
        except (pyarrow.ArrowException, OSError) as error:
            _raise_if_store_failed(source, error)
            if self._span.start == 0:
                yield BadDocument(1, f"not a readable Parquet file: {_first_line(error)}{REST_LOST}")

    def _arrow(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        import pyarrow

        try:
            with source.open() as file:
                schema, batches = _open_arrow(file)
                path = _column_path(schema, self._text_field)
                if path is None:
                    rows = sum(batch.num_rows for batch in batches)
                    if rows:
                        yield BadDocument(1, _no_column(self._text_field, schema.names), lost=rows)
                    return
                yield from self._cells((batch.select([path[0]]) for batch in batches), path)
        except (pyarrow.ArrowException, OSError) as error:
            _raise_if_store_failed(source, error)
            yield BadDocument(self.line + 1, f"not a readable Arrow file: {_first_line(error)}{REST_LOST}")

    def _cells(self, batches: Iterable[Any], path: tuple[str, ...]) -> Iterator[bytes | BadDocument]:
        for batch in batches:
            for value in batch.column(0):
                yield self._cell(value, self._text_field, path[1:])

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
        except Exception as error:  # from Arrow, a decompressor or the network
            # This is not a broken document: the same rows may be readable a minute later.
            raise DataError(
                f"{source.name}: reading {source.unit} {self._span.start} to {self._span.stop} failed: "
                f"{in_words(error)}. Finished work is kept; run again to continue"
            ) from error

    def _cell(self, scalar: Any, column: str, path: tuple[str, ...] = ()) -> bytes | BadDocument:
        self.line += 1
        try:
            value = scalar.as_py()
            for key in path:
                value = None if value is None else value[key]
            document = document_from_value(value, column)
        except UnicodeDecodeError:
            document = Broken("not valid UTF-8")
        return self._checked(document)

    def _summed(self, documents: Iterator[bytes | BadDocument]) -> Iterator[bytes | BadDocument]:
        for document in documents:
            self._add_to_sum(document)
            yield document

    def _add_to_sum(self, document: bytes | BadDocument) -> None:
        text = document if isinstance(document, bytes) else b""
        self._sum.update(b"%d " % len(text))
        self._sum.update(text)


def _raise_if_store_failed(source: SourceFile, error: Exception) -> None:
    """Raises DataError if `error` may come from the object store and not from the file's content."""
    import pyarrow

    if source.is_remote and not isinstance(error, pyarrow.ArrowInvalid):
        raise unreadable(source.location, error) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _rows_of(rows: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """The rows of a table, and an error for each row that is not valid CSV."""
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


def _no_column(column: str, names: Iterable[str]) -> str:
    return f"no column {column!r}; it has {', '.join(names)}"


def _column_path(schema: Any, name: str) -> tuple[str, ...] | None:
    """The column `name`, or the column and the keys of nested columns that it names, separated by dots."""
    import pyarrow

    if name in schema.names:
        return (name,)
    path = tuple(name.split("."))
    kind: Any = schema
    for key in path:
        if kind is not schema and not pyarrow.types.is_struct(kind):
            return None
        index = kind.get_field_index(key)
        if index < 0:
            return None
        kind = kind.field(index).type
    return path


def _open_arrow(file: Any) -> tuple[Any, Iterator[Any]]:
    """The schema and the record batches of an Arrow file, in either of the two formats that exist."""
    import pyarrow

    try:
        table = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        stream = pyarrow.ipc.open_stream(file)
        return stream.schema, iter(stream)
    return table.schema, (table.get_batch(index) for index in range(table.num_record_batches))


def checksum_of_range(source: SourceFile, start: int, stop: int) -> str:
    """The xxh3_128 of the bytes [start, stop) of a file."""
    digest = xxhash.xxh3_128()
    left = stop - start
    for block in source.read_blocks(start) if left else ():
        digest.update(memoryview(block)[:left])
        left -= len(block)
        if left <= 0:
            break
    return digest.hexdigest()
