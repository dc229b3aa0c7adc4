"""A chunk of the input → token shards of its own: the work that preparation does in parallel."""

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
from data_pipeline.prepare.dedup import copies
from data_pipeline.prepare.progress import Advance
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.tokenizer.encoding import Encoding
from data_pipeline.tokenizer.fast_encoder import Disagreement, Encoder, EncoderChoice, Flat, TiktokenEncoder

# Documents are gathered to this many bytes before they are encoded together.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeSettings:
    """All that decides what a chunk becomes, besides the chunk."""

    encoding: Path
    encoder: EncoderChoice
    dtype: str
    text_field: str
    val_fraction: float
    seed: int
    shard_tokens: int
    deduplicate: bool = False


def encode_chunk(
    folder: Path, chunk: Chunk, settings: EncodeSettings, encoding: Encoding, encoder: Encoder
) -> Iterator[Advance]:
    """Encode `chunk`, saying how it goes, and at the end commit it as a folder of its name under `folder`.

    Where a fast `encoder` turns out to be wrong its work on the chunk is thrown away and tiktoken's taken.
    """
    told: list[Advance] = []
    try:
        for advance in _encode_chunk(folder, chunk, settings, encoder):
            told.append(advance)
            yield advance
    except Disagreement as error:
        shutil.rmtree(_temporary(folder, chunk))
        behind = [-sum(column) for column in zip(*(advance[:3] for advance in told), strict=True)] or [0] * 3
        yield Advance(behind[0], behind[1], behind[2], f"tokenizing again with tiktoken: {error}")
        yield from _encode_chunk(folder, chunk, settings, TiktokenEncoder(encoding))


def _temporary(folder: Path, chunk: Chunk) -> Path:
    return folder / f".{chunk.name}.{socket.gethostname()}.{os.getpid()}"  # others may be at it elsewhere


def _encode_chunk(
    folder: Path, chunk: Chunk, settings: EncodeSettings, encoder: Encoder
) -> Iterator[Advance]:
    temporary = _temporary(folder, chunk)
    temporary.mkdir()
    record = ChunkRecord(encoder=encoder.name)
    train, val = (_Batch(split, settings, encoder, record, temporary) for split in ("train", "val"))
    note = copies(folder, chunk) if settings.deduplicate else b""
    record.copies_note = xxhash.xxh3_128_hexdigest(note) if note else ""
    is_copy = iter(note or repeat(False))
    for number, span in enumerate(chunk.spans):
        reader = DocumentReader(span, settings.text_field)
        told = 0
        for document in reader:
            if isinstance(document, BadDocument):
                record.list_bad(ListedDocument(number, document.line, document.reason))
            elif not document:
                record.empty += 1
            elif _next_note(is_copy, chunk):
                record.copies += 1
            else:
                batch = val if is_held_out(document, settings.val_fraction, settings.seed) else train
                if batch.add(document, (number, reader.line)):
                    documents, tokens = batch.encode()
                    now = reader.bytes_read
                    yield Advance(now - told, documents, tokens)
                    told = now
        (documents, tokens), (val_documents, val_tokens) = train.encode(), val.encode()
        yield Advance(span.size_bytes - told, documents + val_documents, tokens + val_tokens)
        record.checksums.append(reader.checksum)
    record.train, record.val = train.finish(), val.finish()
    record.listed.sort()  # what cannot be encoded is found out later than what cannot be read
    write_durably(temporary / RECORD_FILE, (json.dumps(asdict(record)) + "\n").encode())
    try:
        temporary.rename(folder / chunk.name)
    except OSError:
        if read_chunk_record(folder, chunk) is None:
            raise
        shutil.rmtree(temporary)  # somebody else was as quick, with the same bytes
    fsync_folder(folder)


def _next_note(is_copy: Iterator[int], chunk: Chunk) -> int:
    noted = next(is_copy, None)
    if noted is None:
        name = chunk.spans[0].source.name
        raise DataError(f"{name}: it changed after its documents were hashed; run again to begin it anew")
    return noted


class _Batch:
    """Documents of one split of a chunk that are encoded together, and where their ids go."""

    def __init__(
        self, split: Split, settings: EncodeSettings, encoder: Encoder, record: ChunkRecord, folder: Path
    ) -> None:
        self._encoder = encoder
        self._record = record
        self._writer = _Writer(folder, split, settings)
        self._documents: list[bytes] = []
        self._places: list[tuple[int, int]] = []
        self._bytes = 0

    def add(self, document: bytes, place: tuple[int, int]) -> bool:
        """Take a document that stands in (span, line); whether it is time to encode."""
        self._documents.append(document)
        self._places.append(place)
        self._bytes += len(document)
        return self._bytes >= _BATCH_BYTES

    def encode(self) -> tuple[int, int]:
        """Encode and write what was taken: how many documents and tokens."""
        if not self._documents:
            return 0, 0
        try:
            encoded = [self._encoder.encode(self._documents)]
        except DataError:
            encoded = list(self._encode_one_by_one())
        self._documents, self._places, self._bytes = [], [], 0
        for ids, offsets in encoded:
            self._writer.write(ids, np.diff(offsets))
        documents = sum(len(offsets) - 1 for _, offsets in encoded)
        tokens = sum(len(ids) for ids, _ in encoded)
        self._record.documents += documents
        self._record.tokens += tokens
        return documents, tokens

    def _encode_one_by_one(self) -> Iterator[Flat]:
        """The same without the documents that cannot be encoded, which are listed as broken."""
        for document, place in zip(self._documents, self._places, strict=True):
            try:
                yield self._encoder.encode([document])
            except DataError as error:
                self._record.list_bad(ListedDocument(*place, str(error)))

    def finish(self) -> list[Shard]:
        """The shards of the split, all of them on disk."""
        return self._writer.finish()


class _Writer:
    """The shards of one split of a chunk: one is closed with the document that fills it."""

    def __init__(self, folder: Path, split: Split, settings: EncodeSettings) -> None:
        self._folder = folder
        self._split = split
        self._settings = settings
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None

    def write(self, ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Append documents of `lengths` tokens, whose ids stand in `ids` one after the other."""
        ends = np.cumsum(lengths)
        first, behind = 0, 0
        while first < len(lengths):
            if self._writer is None:
                name = f"{self._split}-{len(self._shards):05d}"
                self._writer = ShardWriter(self._folder, name, self._settings.dtype)
            room = self._settings.shard_tokens - self._writer.tokens
            last = min(int(np.searchsorted(ends, behind + room)), len(lengths) - 1)
            end = int(ends[last])
            self._writer.write(ids[behind:end], array("i", lengths[first : last + 1].tolist()))
            first, behind = last + 1, end
            if self._writer.tokens >= self._settings.shard_tokens:
                self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.finish())
            self._writer = None

    def finish(self) -> list[Shard]:
        """Every shard that was written, all of them on disk."""
        self._close()
        return self._shards
