"""Parts of a source that are read on their own, and where in the source their lines are."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.sources.compression import DamagedError, decompress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.parquet import open_table, row_groups_within


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
        is_cut = isinstance(self.source, SourceFile) and is_plain_lines(self.source)
        return (self.start, self.stop) if is_cut else (0, None)


def is_plain_lines(source: SourceFile) -> bool:
    """Whether it is cut by its own bytes, each of which is read once, in the span that it belongs to."""
    return source.suffix == ".jsonl"


def locate_line(span: Span, line: int) -> str:
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
        with open_table(source) as table:
            metadata = table.metadata
        groups = row_groups_within(metadata, 0, span.start)
        return sum(int(metadata.row_group(group).num_rows) for group in groups)
    left = span.lines[0] - 1  # the byte before the span belongs to the last line before it
    newlines = 0
    with suppress(DamagedError):
        for chunk in decompress(source.read_blocks(), source.suffix):
            newlines += chunk.count(b"\n", 0, max(0, left))
            left -= len(chunk)
            if left <= 0:
                break
    return newlines + 1
