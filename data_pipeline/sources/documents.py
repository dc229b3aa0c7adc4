"""Reads the documents of a span, in order, and reports the broken ones.

The reader never drops a broken document silently: it returns a BadDocument with the line and the reason, and
the caller decides. Compressed data that ends too early counts as a broken document too.
"""

import io
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.remote import in_words, unreadable
from data_pipeline.sources.compression import DamagedError, decompress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.parquet import open_table, row_groups_within
from data_pipeline.sources.parsing import document_from_json, document_from_value, skip_blocks, split_lines
from data_pipeline.sources.spans import Span, is_plain_lines

# A .txt file is one document. The document and its token ids are held in memory.
LARGEST_TEXT_BYTES = 1 << 30


class BadDocument(NamedTuple):
    """A document that cannot be used. `line` counts from 1 at the beginning of the span."""

    line: int
    reason: str


class DocumentReader:
    """Iterates over the documents of a span: UTF-8 bytes, or a BadDocument for each broken one.

    An empty document is b"". `bytes_read` is the progress within the span and `line` the span's line of the
    last document. After the iteration, `checksum` is the xxh3_128 of the span's bytes. Rows of a data set and
    files in an object store are read only once, so there it is the xxh3_128 of the documents' texts instead.
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

    @property
    def checksum(self) -> str:
        """The xxh3_128 of the span; see the class."""
        source = self._span.source
        if isinstance(source, RowSource) or source.is_remote or is_plain_lines(source):
            return self._sum.hexdigest()
        return _checksum(source, self._span)

    def _file(self, source: SourceFile) -> Iterator[bytes | BadDocument]:
        suffix = source.suffix
        if suffix == ".parquet":
            return self._parquet(source)
        # Reading starts one byte before the span: the line of that byte, up to its newline, belongs to the
        # span before.
        begin = max(0, self._span.start - 1) if is_plain_lines(source) else 0
        blocks = decompress(self._raw_blocks(source, begin), suffix)
        return self._text(blocks) if suffix.startswith(".txt") else self._jsonl(blocks)

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
                begin, end = end, end + len(line)
                if begin < start:
                    continue
                if stop is not None and begin >= stop:
                    return
                self.line += 1
                if begin == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                document = document_from_json(line, self._text_field)
                yield BadDocument(self.line, document) if isinstance(document, str) else document
        except DamagedError as error:
            if stop is None or self._span.text is None:  # only the last of several spans reports it
                yield BadDocument(self.line + 1, str(error))

    def _text(self, blocks: Iterable[bytes]) -> Iterator[bytes | BadDocument]:
        whole = io.BytesIO()
        self.line = 1
        try:
            for block in blocks:
                whole.write(block)
                if whole.tell() > LARGEST_TEXT_BYTES:
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
            with open_table(source) as table:
                names = table.schema_arrow.names
                if self._text_field not in names:
                    if self._span.start == 0:
                        yield BadDocument(1, f"no column {self._text_field!r}; it has {', '.join(names)}")
                    return
                groups = row_groups_within(table.metadata, self._span.start, self._span.stop)
                sizes = [int(table.metadata.row_group(group).num_rows) for group in groups]
                for group, begin, size in zip(groups, accumulate(sizes, initial=0), sizes, strict=False):
                    try:
                        yield from self._row_group(table, group)
                    except (pyarrow.ArrowException, OSError) as error:
                        _raise_if_store_failed(source, error)
                        yield BadDocument(
                            self.line + 1,
                            f"rows to the end of their group are unreadable: {_first_line(error)}",
                        )
                        self.line = begin + size
                    self.bytes_read = self._span.size_bytes * self.line // max(1, sum(sizes))
        except (pyarrow.ArrowException, OSError) as error:
            _raise_if_store_failed(source, error)
            if self._span.start == 0:
                yield BadDocument(1, f"not a readable Parquet file: {_first_line(error)}")

    def _row_group(self, table: Any, group: int) -> Iterator[bytes | BadDocument]:
        batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=[self._text_field])
        for batch in batches:
            for value in batch.column(0):
                yield self._cell(value, self._text_field)

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

    def _cell(self, value: Any, column: str) -> bytes | BadDocument:
        self.line += 1
        try:
            document = document_from_value(value.as_py(), column)
        except UnicodeDecodeError:
            document = "not valid UTF-8"
        return BadDocument(self.line, document) if isinstance(document, str) else document

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


def _checksum(source: SourceFile, span: Span) -> str:
    digest = xxhash.xxh3_128()
    left = span.stop - span.start
    for block in source.read_blocks(span.start) if left else ():
        digest.update(memoryview(block)[:left])
        left -= len(block)
        if left <= 0:
            break
    return digest.hexdigest()
