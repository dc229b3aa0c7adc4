"""Spans: the parts of a source that workers read independently of each other."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.sources.compression import DamagedError, decompress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.parquet import open_table, row_groups_within


@dataclass(frozen=True)
class Span:
    """The units [start, stop) of a source: bytes of a file, or rows or shards of a Hugging Face data set.

    A span of a .jsonl file contains the whole lines that begin in it, and a span of a Parquet file the row
    groups that begin in it. A compressed file can only be read from its beginning. Where several spans share
    one, `text` gives the range of its decompressed bytes that belongs to this span; an end of None means up
    to the end of the file.
    """

    source: SourceFile | RowSource
    start: int
    stop: int
    text: tuple[int, int | None] | None = None

    @property
    def size_bytes(self) -> int:
        """The span's share of the source's bytes."""
        units = max(1, self.source.units)
        return self.source.size_bytes * self.stop // units - self.source.size_bytes * self.start // units

    @property
    def lines(self) -> tuple[int, int | None]:
        """The range of the decompressed bytes in which this span's lines begin; None is the end."""
        if self.text is not None:
            return self.text
        is_cut = isinstance(self.source, SourceFile) and is_plain_lines(self.source)
        return (self.start, self.stop) if is_cut else (0, None)


def is_plain_lines(source: SourceFile) -> bool:
    """Whether spans of `source` are ranges of uncompressed lines, so that each byte belongs to one span."""
    return source.kind == "lines" and not source.compression


def locate_line(span: Span, line: int) -> str:
    """`FILE:LINE` of line or row `line` of the span; both count from 1."""
    source = span.source
    if isinstance(source, SourceFile):
        if source.kind in ("json", "csv", "tsv", "arrow"):
            return f"{source.location}: document {line}"
        return f"{source.location}:{_lines_before(span, source) + line}"
    if source.is_streamed:
        return f"{source.name}, shards {span.start} to {span.stop}:{line}"
    return f"{source.name}:{span.start + line}"


@lru_cache(maxsize=8)  # an error lists many lines of one span
def _lines_before(span: Span, source: SourceFile) -> int:
    """The number of lines or rows of the file that come before the span."""
    if span.start == 0:
        return 0
    if source.kind == "parquet":
        with open_table(source) as table:
            metadata = table.metadata
        groups = row_groups_within(metadata, 0, span.start)
        return sum(int(metadata.row_group(group).num_rows) for group in groups)
    left = span.lines[0] - 1  # the byte before the span belongs to the last line before it
    newlines = 0
    with suppress(DamagedError):
        for block in decompress(source.read_blocks(), source.compression):
            newlines += block.count(b"\n", 0, max(0, left))
            left -= len(block)
            if left <= 0:
                break
    return newlines + 1
