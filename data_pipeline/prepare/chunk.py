"""A piece of the input → token shards of its own: the work that preparation does in parallel.

Which pieces there are is decided by the sources alone, and what a piece becomes by the piece and the
settings alone; so neither the number of workers nor a kill can be seen in the result. A piece is committed
by one rename of its folder. Ids go from the encoder to the file in the process that made them.
"""

import hashlib
import json
import os
import shutil
import socket
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import Shard, Split, shard_from_json
from data_pipeline.dataset.shards import ShardWriter
from data_pipeline.durable import fsync_folder, write_durably
from data_pipeline.errors import DataError
from data_pipeline.prepare.dedup import copies
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.sources.spans import Span
from data_pipeline.tokenizer.encoding import Encoding
from data_pipeline.tokenizer.fast_encoder import Choice, Disagreement, Encoder, Flat, TiktokenEncoder

# At most this many broken documents are listed; all are counted.
MOST_LISTED = 100

_RECORD = "piece.json"
# Documents are gathered to this many bytes before they are encoded together.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """All that decides what a piece becomes, besides the piece."""

    encoding: Path
    encoder: Choice
    dtype: str
    text_field: str
    val_fraction: float
    seed: int
    shard_tokens: int
    deduplicate: bool = False


@dataclass(frozen=True)
class Piece:
    """Spans of files that are encoded together; `name` changes with any of them."""

    spans: tuple[Span, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the files in this piece."""
        return sum(span.size_bytes for span in self.spans)

    @property
    def name(self) -> str:
        """A folder name by which to find the piece again as long as its files did not change."""
        parts = [(*s.source.identity, s.start, s.stop, s.text) for s in self.spans]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Listed(NamedTuple):
    """A broken document: which span of the piece, which line of the span, why."""

    span: int
    line: int
    reason: str


@dataclass
class PieceRecord:
    """What a committed piece holds.

    `checksums` are xxh3_128 over each span, as its reader says; `encoder` the package that made the ids;
    `copies_note` the checksum of the note that says which documents were left out as copies.
    """

    train: list[Shard] = field(default_factory=list)
    val: list[Shard] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    listed: list[Listed] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)
    encoder: str = ""
    copies: int = 0
    copies_note: str = ""

    def shards(self, split: Split) -> list[Shard]:
        """The shards of one split, in order."""
        return self.train if split == "train" else self.val

    def list_bad(self, bad: Listed) -> None:
        """Count a broken document, and list it if there is room."""
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)


class Advance(NamedTuple):
    """What a worker has done since it last said so, and something to tell the user."""

    bytes: int
    documents: int
    tokens: int
    message: str | None = None


def committed(folder: Path, piece: Piece) -> PieceRecord | None:
    """The record of `piece` where it is committed under `folder`."""
    path = folder / piece.name / _RECORD
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    return PieceRecord(
        train=[shard_from_json(shard) for shard in content["train"]],
        val=[shard_from_json(shard) for shard in content["val"]],
        documents=content["documents"],
        tokens=content["tokens"],
        empty=content["empty"],
        bad=content["bad"],
        listed=[Listed(*entry) for entry in content["listed"]],
        checksums=content["checksums"],
        encoder=content["encoder"],
        copies=content["copies"],
        copies_note=content["copies_note"],
    )


def encode_piece(
    folder: Path, piece: Piece, settings: Settings, encoding: Encoding, encoder: Encoder
) -> Iterator[Advance]:
    """Encode `piece`, saying how it goes, and at the end commit it as a folder of its name under `folder`.

    Where a fast `encoder` turns out to be wrong its work on the piece is thrown away and tiktoken's taken.
    """
    told: list[Advance] = []
    try:
        for advance in _encode_piece(folder, piece, settings, encoder):
            told.append(advance)
            yield advance
    except Disagreement as error:
        shutil.rmtree(_temporary(folder, piece))
        behind = [-sum(column) for column in zip(*(advance[:3] for advance in told), strict=True)] or [0] * 3
        yield Advance(behind[0], behind[1], behind[2], f"tokenizing again with tiktoken: {error}")
        yield from _encode_piece(folder, piece, settings, TiktokenEncoder(encoding))


def _temporary(folder: Path, piece: Piece) -> Path:
    return folder / f".{piece.name}.{socket.gethostname()}.{os.getpid()}"  # others may be at it elsewhere


def _encode_piece(folder: Path, piece: Piece, settings: Settings, encoder: Encoder) -> Iterator[Advance]:
    temporary = _temporary(folder, piece)
    temporary.mkdir()
    record = PieceRecord(encoder=encoder.name)
    train, val = (_Batch(split, settings, encoder, record, temporary) for split in ("train", "val"))
    note = copies(folder, piece) if settings.deduplicate else b""
    record.copies_note = xxhash.xxh3_128_hexdigest(note) if note else ""
    is_copy = iter(note or repeat(False))
    for number, span in enumerate(piece.spans):
        reader = DocumentReader(span, settings.text_field)
        told = 0
        for document in reader:
            if isinstance(document, BadDocument):
                record.list_bad(Listed(number, document.line, document.reason))
            elif not document:
                record.empty += 1
            elif _next_note(is_copy, piece):
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
    write_durably(temporary / _RECORD, (json.dumps(asdict(record)) + "\n").encode())
    try:
        temporary.rename(folder / piece.name)
    except OSError:
        if committed(folder, piece) is None:
            raise
        shutil.rmtree(temporary)  # somebody else was as quick, with the same bytes
    fsync_folder(folder)


def _next_note(is_copy: Iterator[int], piece: Piece) -> int:
    noted = next(is_copy, None)
    if noted is None:
        name = piece.spans[0].source.name
        raise DataError(f"{name}: it changed after its documents were hashed; run again to begin it anew")
    return noted


class _Batch:
    """Documents of one split of a piece that are encoded together, and where their ids go."""

    def __init__(
        self, split: Split, settings: Settings, encoder: Encoder, record: PieceRecord, folder: Path
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
                self._record.list_bad(Listed(*place, str(error)))

    def finish(self) -> list[Shard]:
        """The shards of the split, all of them on disk."""
        return self._writer.finish()


class _Writer:
    """The shards of one split of a piece: one is closed with the document that fills it."""

    def __init__(self, folder: Path, split: Split, settings: Settings) -> None:
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
