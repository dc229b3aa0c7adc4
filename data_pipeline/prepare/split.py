"""Which chunks there are: decided by the sources alone, so that any number of workers makes the same ones."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from data_pipeline.prepare.chunk import Chunk
from data_pipeline.sources.compression import text_per_byte
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.spans import Span

# How many bytes of text a byte of the file holds, roughly, so that chunks take about equal time.
_EXPANSION = {".gz": 4, ".zst": 4, ".parquet": 3}
_LEAST_PIECES = 64
_SMALLEST_BYTES = 4 << 20
# A compressed file is read by several workers by letting each inflate it up to its part; inflating is many
# times faster than encoding, and more parts than these would not pay.
_MOST_PARTS = 8


def split_into_chunks(sources: Sequence[SourceFile | RowSource], shard_tokens: int) -> list[Chunk]:
    """The chunks of `sources`, in order: about 64 of them, but none smaller than is worth it.

    Lines and tables are cut anywhere, a compressed file that is a large share of all into a few parts. No
    chunk is larger than what makes a shard or so, where its source can be cut.
    """
    total = sum(source.size_bytes * _expansion(source) for source in sources)
    share = max(total // _LEAST_PIECES, _SMALLEST_BYTES)
    splitter = _Splitter(max(1, min(share, 4 * shard_tokens)))  # a token is about four bytes of text
    for source in sources:
        if isinstance(source, RowSource):
            splitter.cut_rows(source)
        elif source.is_divisible:
            splitter.cut_anywhere(source)
        else:
            splitter.cut_text(source, share)
    return splitter.finish()


def _expansion(source: SourceFile | RowSource) -> int:
    return _EXPANSION.get(PurePath(source.location).suffix, 1) if isinstance(source, SourceFile) else 1


class _Splitter:
    """Gathers spans until they make a chunk of `target` bytes of text."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pieces: list[Chunk] = []
        self._spans: list[Span] = []
        self._filled = 0

    def cut_anywhere(self, source: SourceFile) -> None:
        """Plain lines and tables: at the byte that fills the chunk."""
        start = 0
        while True:
            room = (self._target - self._filled) // _expansion(source)
            stop = min(start + max(1, room), source.size_bytes)
            self._add(Span(source, start, stop))
            start = stop
            if start >= source.size_bytes:
                return

    def cut_rows(self, source: RowSource) -> None:
        """Data sets: at a row, or a shard each where they are streamed."""
        row_bytes = max(1, source.size_bytes // max(1, source.units))
        start = 0
        while start < source.units:
            count = 1 if source.is_streamed else max(1, (self._target - self._filled) // row_bytes)
            stop = min(start + count, source.units)
            self._add(Span(source, start, stop))
            start = stop
            if source.is_streamed:  # of unknown size, and slow to read again
                self._close()

    def cut_text(self, source: SourceFile, share: int) -> None:
        """Compressed files: whole, or in parts of equal text where one is more than its `share` of all."""
        parts = min(_MOST_PARTS, source.size_bytes * _expansion(source) // share)
        if (
            parts < 2 or source.suffix.startswith(".txt") or source.is_remote
        ):  # or it would be fetched for each
            self._add(Span(source, 0, source.size_bytes))
            return
        text_bytes = int(source.size_bytes * text_per_byte(Path(source.location), source.suffix) / parts)
        for part in range(parts):
            start, stop = source.size_bytes * part // parts, source.size_bytes * (part + 1) // parts
            until = None if part == parts - 1 else text_bytes * (part + 1)
            self._add(Span(source, start, stop, text=(text_bytes * part, until)))

    def _add(self, span: Span) -> None:
        self._spans.append(span)
        self._filled += span.size_bytes * _expansion(span.source)
        if self._filled >= self._target:
            self._close()

    def _close(self) -> None:
        self._pieces.append(Chunk(tuple(self._spans)))
        self._spans, self._filled = [], 0

    def finish(self) -> list[Chunk]:
        """Every chunk, the last one as full as it is."""
        if self._spans:
            self._close()
        return self._pieces
