"""Splits the sources into chunks. The sources alone decide, so any number of workers gets the same chunks."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from data_pipeline.prepare.chunk import Chunk
from data_pipeline.sources.compression import text_per_byte
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.spans import Span

# A rough estimate of the bytes of text per byte of the file, so that chunks take about equal time.
_EXPANSION = {".gz": 4, ".zst": 4, ".xz": 5, ".bz2": 5, ".parquet": 3}
_LEAST_CHUNKS = 64
_SMALLEST_BYTES = 4 << 20
# Several workers share a compressed file in that each decompresses it up to its own part. Decompressing is
# many times as fast as encoding, but more parts than this do not pay off.
_MOST_PARTS = 8


def split_into_chunks(sources: Sequence[SourceFile | RowSource], shard_tokens: int) -> list[Chunk]:
    """The chunks of `sources`, in order: about 64 of them, but fewer if they would become too small.

    Lines and tables are split anywhere. A compressed file is split into a few parts if it is a large share
    of the sources. Wherever a source can be split, a chunk has at most about one shard's worth of text.
    """
    total = sum(source.size_bytes * _expansion(source) for source in sources)
    share = max(total // _LEAST_CHUNKS, _SMALLEST_BYTES)
    splitter = _Splitter(max(1, min(share, 4 * shard_tokens)))  # a token is about four bytes of text
    for source in sources:
        if isinstance(source, RowSource):
            splitter.add_rows(source)
        elif source.is_divisible:
            splitter.add_divisible(source)
        else:
            splitter.add_compressed(source, share)
    return splitter.finish()


def _expansion(source: SourceFile | RowSource) -> int:
    return (
        _EXPANSION.get(PurePath(source.location).suffix.lower(), 1) if isinstance(source, SourceFile) else 1
    )


class _Splitter:
    """Collects spans until they make a chunk of `target` bytes of text."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._chunks: list[Chunk] = []
        self._spans: list[Span] = []
        self._filled = 0

    def add_divisible(self, source: SourceFile) -> None:
        """Split plain lines or a table at the byte that fills the chunk."""
        start = 0
        while True:
            room = (self._target - self._filled) // _expansion(source)
            stop = min(start + max(1, room), source.size_bytes)
            self._add(Span(source, start, stop))
            start = stop
            if start >= source.size_bytes:
                return

    def add_rows(self, source: RowSource) -> None:
        """Split a data set at a row; of a streamed one, each shard is a chunk."""
        row_bytes = max(1, source.size_bytes // max(1, source.units))
        start = 0
        while start < source.units:
            count = 1 if source.is_streamed else max(1, (self._target - self._filled) // row_bytes)
            stop = min(start + count, source.units)
            self._add(Span(source, start, stop))
            start = stop
            if source.is_streamed:  # its size is unknown, and reading it again is slow
                self._close()

    def add_compressed(self, source: SourceFile, share: int) -> None:
        """Keep a file whole, or split it into parts of equal text if it has more than `share` bytes."""
        parts = min(_MOST_PARTS, source.size_bytes * _expansion(source) // share)
        # A remote file is not split, because every part would fetch it from the beginning.
        # Only of lines it is known where a part begins.
        if parts < 2 or source.kind != "lines" or source.is_remote:
            self._add(Span(source, 0, source.size_bytes))
            return
        text_bytes = int(source.size_bytes * text_per_byte(Path(source.location), source.compression) / parts)
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
        self._chunks.append(Chunk(tuple(self._spans)))
        self._spans, self._filled = [], 0

    def finish(self) -> list[Chunk]:
        """All chunks; the last one may be smaller than the others."""
        if self._spans:
            self._close()
        return self._chunks
