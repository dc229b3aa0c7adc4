"""Chunks: the parts of the input that a preparation encodes independently of each other.

The sources alone determine the chunks, and the chunk and the settings determine its shards. So neither the
number of workers nor a crash changes the resulting bytes. One rename of the chunk's folder commits it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.dataset.manifest import Shard, Split, shard_from_json
from data_pipeline.sources.spans import Span

# An error lists at most this many broken documents. All of them are counted.
MOST_LISTED = 100

RECORD_FILE = "piece.json"


@dataclass(frozen=True)
class Chunk:
    """Spans that one worker encodes together."""

    spans: tuple[Span, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of all spans."""
        return sum(span.size_bytes for span in self.spans)

    @property
    def name(self) -> str:
        """The chunk's folder name: a hash of its spans, so it changes when a file of the chunk does."""
        parts = [(*s.source.identity, s.start, s.stop, s.text) for s in self.spans]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class ListedDocument(NamedTuple):
    """A broken document: the number of its span in the chunk, its place in the span, and the reason.

    `lost` is the number of documents that the reason leaves out.
    """

    span: int
    line: int
    reason: str
    column: int | None = None
    lost: int = 1


@dataclass
class ChunkRecord:
    """What a committed chunk contains; its field names are the keys of the JSON file.

    `checksums` are those of the spans, as DocumentReader computes them. `encoder` is the package that
    computed the ids. `copies_note` is the checksum of the note that marks the copies left out.
    """

    train: list[Shard] = field(default_factory=list)
    val: list[Shard] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    listed: list[ListedDocument] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)
    encoder: str = ""
    copies: int = 0
    copies_note: str = ""

    def shards(self, split: Split) -> list[Shard]:
        """The shards of one split, in order."""
        return self.train if split == "train" else self.val

    def add_bad(self, bad: ListedDocument) -> None:
        """Count a broken document, and list it unless MOST_LISTED are listed already."""
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + bad.lost
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)


def read_chunk_record(folder: Path, chunk: Chunk) -> ChunkRecord | None:
    """The record of `chunk`, or None if the chunk is not committed under `folder`."""
    path = folder / chunk.name / RECORD_FILE
    if not path.exists():
        return None
    content = json.loads(path.read_bytes())
    return ChunkRecord(
        train=[shard_from_json(shard) for shard in content["train"]],
        val=[shard_from_json(shard) for shard in content["val"]],
        documents=content["documents"],
        tokens=content["tokens"],
        empty=content["empty"],
        bad=content["bad"],
        listed=[ListedDocument(*entry) for entry in content["listed"]],
        checksums=content["checksums"],
        encoder=content["encoder"],
        copies=content["copies"],
        copies_note=content["copies_note"],
    )
