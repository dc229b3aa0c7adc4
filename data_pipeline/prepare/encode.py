"""Encodes a chunk: reads its documents, encodes them in batches, and writes shards of its own.

The ids go from the encoder to the file in the same process.
"""

import json
import os
import shutil
import socket
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import Shard, Split
from data_pipeline.dataset.shards import ShardWriter
from data_pipeline.durable import fsync_folder, write_durably
from data_pipeline.errors import DataError
from data_pipeline.prepare.chunk import RECORD_FILE, Chunk, ChunkRecord, ListedDocument, read_chunk_record
from data_pipeline.prepare.dedup import read_copies_note
from data_pipeline.prepare.progress import Advance
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.tokenizer.encoding import Encoding
from data_pipeline.tokenizer.fast_encoder import (
    Encoder,
    EncoderChoice,
    EncoderMismatch,
    FlatIds,
    TiktokenEncoder,
)

# The encoder gets batches of documents of about this size.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeSettings:
    """Everything besides the chunk itself that determines the chunk's shards."""

    encoding: Path
    encoder: EncoderChoice
    dtype: str
    text_field: str
    val_fraction: float
    seed: int
    shard_tokens: int
    deduplicate: bool = False
    document_separator: str | None = None


def encode_chunk(
    folder: Path, chunk: Chunk, settings: EncodeSettings, encoding: Encoding, encoder: Encoder
) -> Iterator[Advance]:
    """Encode `chunk` and commit it as a folder of its name under `folder`; yields its progress.

    If a fast `encoder` returns wrong ids, its work on the chunk is discarded and tiktoken encodes the chunk.
    """
    reported: list[Advance] = []
    try:
        for advance in _encode_chunk(folder, chunk, settings, encoder):
            reported.append(advance)
            yield advance
    except EncoderMismatch as error:
        shutil.rmtree(_temporary(folder, chunk))
        yield Advance(
            -sum(advance.bytes for advance in reported),
            -sum(advance.documents for advance in reported),
            -sum(advance.tokens for advance in reported),
            f"tokenizing again with tiktoken: {error}",
        )
        yield from _encode_chunk(folder, chunk, settings, TiktokenEncoder(encoding))


def _temporary(folder: Path, chunk: Chunk) -> Path:
    """A name that no other process uses: several machines may work on one chunk."""
    return folder / f".{chunk.name}.{socket.gethostname()}.{os.getpid()}"


def _encode_chunk(
    folder: Path, chunk: Chunk, settings: EncodeSettings, encoder: Encoder
) -> Iterator[Advance]:
    temporary = _temporary(folder, chunk)
    temporary.mkdir()
    record = ChunkRecord(encoder=encoder.name)
    train, val = (_SplitEncoder(split, settings, encoder, record, temporary) for split in ("train", "val"))
    note = read_copies_note(folder, chunk) if settings.deduplicate else b""
    record.copies_note = xxhash.xxh3_128_hexdigest(note) if note else ""
    is_copy = iter(note or repeat(False))
    for number, span in enumerate(chunk.spans):
        reader = DocumentReader(span, settings.text_field, settings.document_separator)
        reported_bytes = 0
        for document in reader:
            if isinstance(document, BadDocument):
                record.add_bad(
                    ListedDocument(number, document.line, document.reason, document.column, document.lost)
                )
            elif not document:
                record.empty += 1
            elif _next_is_copy(is_copy, chunk):
                record.copies += 1
            else:
                split = val if is_held_out(document, settings.val_fraction, settings.seed) else train
                if split.add(document, number, reader.line):
                    documents, tokens = split.encode()
                    bytes_read = reader.bytes_read
                    yield Advance(bytes_read - reported_bytes, documents, tokens)
                    reported_bytes = bytes_read
        (documents, tokens), (val_documents, val_tokens) = train.encode(), val.encode()
        yield Advance(span.size_bytes - reported_bytes, documents + val_documents, tokens + val_tokens)
        record.checksums.append(reader.checksum)
    record.train, record.val = train.finish(), val.finish()
    record.listed.sort(
        key=lambda bad: (bad.span, bad.line, bad.reason)
    )  # documents that cannot be encoded are found later than unreadable ones
    write_durably(temporary / RECORD_FILE, (json.dumps(asdict(record)) + "\n").encode())
    _commit(temporary, folder, chunk)


def _commit(temporary: Path, folder: Path, chunk: Chunk) -> None:
    try:
        temporary.rename(folder / chunk.name)
    except OSError:
        if read_chunk_record(folder, chunk) is None:
            raise
        shutil.rmtree(temporary)  # another process has committed the chunk, with the same bytes
    fsync_folder(folder)


def _next_is_copy(is_copy: Iterator[int], chunk: Chunk) -> int:
    mark = next(is_copy, None)
    if mark is None:
        name = chunk.spans[0].source.name
        raise DataError(f"{name}: it changed after its documents were hashed; run again to start it over")
    return mark


class _SplitEncoder:
    """Encodes the documents of one split of a chunk, in batches, and writes their ids to shards."""

    def __init__(
        self, split: Split, settings: EncodeSettings, encoder: Encoder, record: ChunkRecord, folder: Path
    ) -> None:
        self._encoder = encoder
        self._record = record
        self._writer = _SplitWriter(folder, split, settings)
        self._documents: list[bytes] = []
        self._lines: list[tuple[int, int]] = []
        self._bytes = 0

    def add(self, document: bytes, span: int, line: int) -> bool:
        """Add the document at `line` of span number `span`; returns whether the batch is full."""
        self._documents.append(document)
        self._lines.append((span, line))
        self._bytes += len(document)
        return self._bytes >= _BATCH_BYTES

    def encode(self) -> tuple[int, int]:
        """Encode and write the batch; returns its numbers of documents and tokens."""
        if not self._documents:
            return 0, 0
        try:
            encoded = [self._encoder.encode(self._documents)]
        except DataError:
            encoded = list(self._encode_one_by_one())
        self._documents, self._lines, self._bytes = [], [], 0
        for ids, offsets in encoded:
            self._writer.write(ids, np.diff(offsets))
        documents = sum(len(offsets) - 1 for _, offsets in encoded)
        tokens = sum(len(ids) for ids, _ in encoded)
        self._record.documents += documents
        self._record.tokens += tokens
        return documents, tokens

    def _encode_one_by_one(self) -> Iterator[FlatIds]:
        """Encode the batch without the documents that cannot be encoded, which count as broken."""
        for document, (span, line) in zip(self._documents, self._lines, strict=True):
            try:
                yield self._encoder.encode([document])
            except DataError as error:
                self._record.add_bad(ListedDocument(span, line, str(error)))

    def finish(self) -> list[Shard]:
        """The shards of the split, all of them durable."""
        return self._writer.finish()


class _SplitWriter:
    """Writes the shards of one split of a chunk. The document that fills a shard is its last one."""

    def __init__(self, folder: Path, split: Split, settings: EncodeSettings) -> None:
        self._folder = folder
        self._split = split
        self._settings = settings
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None

    def write(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Append documents of `lengths` tokens each, whose ids are concatenated in `ids`."""
        ends = np.cumsum(lengths)
        first, begin = 0, 0
        while first < len(lengths):
            if self._writer is None:
                name = f"{self._split}-{len(self._shards):05d}"
                self._writer = ShardWriter(self._folder, name, self._settings.dtype)
            room = self._settings.shard_tokens - self._writer.tokens
            last = min(int(np.searchsorted(ends, begin + room)), len(lengths) - 1)
            end = int(ends[last])
            self._writer.write(ids[begin:end], array("i", lengths[first : last + 1].tolist()))
            first, begin = last + 1, end
            if self._writer.tokens >= self._settings.shard_tokens:
                self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.finish())
            self._writer = None

    def finish(self) -> list[Shard]:
        """The shards of the split, all of them durable."""
        self._close()
        return self._shards
