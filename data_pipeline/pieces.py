"""A piece of the input → token shards of its own: the work that preparation does in parallel.

Which pieces there are is decided by the sources alone, and what a piece becomes by the piece and the
settings alone; so neither the number of workers nor a kill can be seen in the result. A piece is committed
by one rename of its folder. Ids go from the encoder to the file in the process that made them.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.documents import BadDocument, DocumentReader, Span, is_held_out
from data_pipeline.durable import fsync_folder, write_durably
from data_pipeline.errors import DataError
from data_pipeline.manifest import Shard, Split, shard_from_json
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import SourceFile
from data_pipeline.tokenizer import Encoding

# At most this many broken documents are listed; all are counted.
MOST_LISTED = 100

_RECORD = "piece.json"
# Encoded documents are gathered to this many tokens before they are written.
_GATHER_TOKENS = 1 << 20
# How many bytes of text a byte of the file holds, roughly, so that pieces take about equal time.
_EXPANSION = {".gz": 4, ".zst": 4, ".parquet": 3}


@dataclass(frozen=True)
class Settings:
    """All that decides what a piece becomes, besides the piece."""

    encoding: Path
    dtype: str
    text_field: str
    val_fraction: float
    seed: int
    shard_tokens: int


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
        parts = [
            (str(s.file.path), s.file.name, s.file.size_bytes, s.file.mtime_ns, s.start, s.stop)
            for s in self.spans
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Listed(NamedTuple):
    """A broken document: which span of the piece, which line of the span, why."""

    span: int
    line: int
    reason: str


@dataclass
class PieceRecord:
    """What a committed piece holds. `checksums` are xxh3_128 over the bytes of each span."""

    train: list[Shard] = field(default_factory=list)
    val: list[Shard] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    listed: list[Listed] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)

    def shards(self, split: Split) -> list[Shard]:
        """The shards of one split, in order."""
        return self.train if split == "train" else self.val

    def list_bad(self, bad: Listed) -> None:
        """Count a broken document, and list it if there is room."""
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)


class Advance(NamedTuple):
    """What a worker has done since it last said so."""

    bytes: int
    documents: int
    tokens: int

    def since(self, earlier: "Advance") -> "Advance":
        """What came after `earlier`."""
        return Advance(*(now - then for now, then in zip(self, earlier, strict=True)))


def cut_into_pieces(files: Sequence[SourceFile], shard_tokens: int) -> list[Piece]:
    """The pieces of `files`, in order: about 64 of them, but none smaller than is worth it.

    A large file of plain lines is cut, a compressed one is not. None is larger than what makes a shard or so.
    """
    total = sum(file.size_bytes * _expansion(file) for file in files)
    most = 4 * shard_tokens  # a token is about four bytes of text
    target = max(1, min(max(total // 64, 4 << 20), most))
    pieces: list[Piece] = []
    spans: list[Span] = []
    filled = 0
    for file in files:
        start = 0
        while True:
            room = target - filled if file.is_divisible else file.size_bytes
            stop = min(start + max(1, room), file.size_bytes)
            spans.append(Span(file, start, stop))
            filled += (stop - start) * _expansion(file)
            if filled >= target:
                pieces.append(Piece(tuple(spans)))
                spans, filled = [], 0
            start = stop
            if start >= file.size_bytes:
                break
    return [*pieces, Piece(tuple(spans))] if spans else pieces


def _expansion(file: SourceFile) -> int:
    return _EXPANSION.get(file.path.suffix, 1)


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
    )


def encode_piece(folder: Path, piece: Piece, settings: Settings, encoding: Encoding) -> Iterator[Advance]:
    """Encode `piece`, saying how it goes, and at the end commit it as a folder of its name under `folder`."""
    temporary = folder / f".{piece.name}.{os.getpid()}"
    temporary.mkdir()
    record = PieceRecord()
    writers = {split: _Writer(temporary, split, settings) for split in ("train", "val")}
    for number, span in enumerate(piece.spans):
        record.checksums.append(_checksum(span))
        reader = DocumentReader(span, settings.text_field)
        told = Advance(0, record.documents, record.tokens)
        for document in reader:
            _encode(document, (number, reader.line), settings, encoding, writers, record)
            if record.tokens - told.tokens > _GATHER_TOKENS // 4:
                now = Advance(reader.bytes_read, record.documents, record.tokens)
                yield now.since(told)
                told = now
        yield Advance(span.size_bytes, record.documents, record.tokens).since(told)
    record.train = writers["train"].finish()
    record.val = writers["val"].finish()
    write_durably(temporary / _RECORD, (json.dumps(asdict(record)) + "\n").encode())
    temporary.rename(folder / piece.name)
    fsync_folder(folder)


def _encode(
    document: bytes | BadDocument,
    place: tuple[int, int],
    settings: Settings,
    encoding: Encoding,
    writers: dict[str, "_Writer"],
    record: PieceRecord,
) -> None:
    if isinstance(document, BadDocument):
        record.list_bad(Listed(place[0], document.line, document.reason))
        return
    if not document:
        record.empty += 1
        return
    try:
        ids = encoding.encode(document.decode())
    except DataError as error:
        record.list_bad(Listed(*place, str(error)))
        return
    split = "val" if is_held_out(document, settings.val_fraction, settings.seed) else "train"
    writers[split].add(ids, encoding.end_of_text)
    record.documents += 1
    record.tokens += len(ids) + 1


def _checksum(span: Span) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    left = span.size_bytes
    with span.file.path.open("rb") as file:
        file.seek(span.start)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class _Writer:
    """The shards of one split of a piece: a new one is begun where one has its tokens."""

    def __init__(self, folder: Path, split: str, settings: Settings) -> None:
        self._folder = folder
        self._split = split
        self._settings = settings
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None
        self._ids: list[NDArray[np.generic]] = []
        self._lengths = array("i")
        self._gathered = 0

    def add(self, ids: NDArray[np.uint32], end_of_text: int) -> None:
        self._ids += [ids, np.array([end_of_text], dtype=np.uint32)]
        self._lengths.append(len(ids) + 1)
        self._gathered += len(ids) + 1
        if self._gathered >= min(_GATHER_TOKENS, self._settings.shard_tokens):
            self._flush()

    def _flush(self) -> None:
        if not self._gathered:
            return
        if self._writer is None:
            name = f"{self._split}-{len(self._shards):05d}"
            self._writer = ShardWriter(self._folder, name, self._settings.dtype)
        self._writer.write(np.concatenate(self._ids), self._lengths)
        self._ids, self._lengths, self._gathered = [], array("i"), 0
        if self._writer.tokens >= self._settings.shard_tokens:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.finish())
            self._writer = None

    def finish(self) -> list[Shard]:
        self._flush()
        self._close()
        return self._shards
