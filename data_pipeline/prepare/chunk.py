"""A chunk of the input → token shards of its own: the work that preparation does in parallel.

Which chunks there are is decided by the sources alone, and what a chunk becomes by the chunk and the
settings alone; so neither the number of workers nor a kill can be seen in the result. A chunk is committed
by one rename of its folder. Ids go from the encoder to the file in the process that made them.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.dataset.manifest import Shard, Split, shard_from_json
from data_pipeline.sources.spans import Span

# At most this many broken documents are listed; all are counted.
MOST_LISTED = 100

RECORD_FILE = "piece.json"


@dataclass(frozen=True)
class Chunk:
    """Spans of files that are encoded together; `name` changes with any of them."""

    spans: tuple[Span, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the files in this chunk."""
        return sum(span.size_bytes for span in self.spans)

    @property
    def name(self) -> str:
        """A folder name by which to find the chunk again as long as its files did not change."""
        parts = [(*s.source.identity, s.start, s.stop, s.text) for s in self.spans]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class ListedDocument(NamedTuple):
    """A broken document: which span of the chunk, which line of the span, why."""

    span: int
    line: int
    reason: str


@dataclass
class ChunkRecord:
    """What a committed chunk holds.

    `checksums` are xxh3_128 over each span, as its reader says; `encoder` the package that made the ids;
    `copies_note` the checksum of the note that says which documents were left out as copies.
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

    def list_bad(self, bad: ListedDocument) -> None:
        """Count a broken document, and list it if there is room."""
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)


def read_chunk_record(folder: Path, chunk: Chunk) -> ChunkRecord | None:
    """The record of `chunk` where it is committed under `folder`."""
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
