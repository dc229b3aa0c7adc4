"""Data directories of random ids, of any size and made in seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import FileRecord, Manifest, Shard
from data_pipeline.dataset.megatron_index import Header
from tests.unit.data_pipeline.support import prepared

_BLOCK_TOKENS = 50_000_000


def _index_of(lengths: NDArray[np.int32]) -> bytes:
    """The .idx file of documents of `lengths` tokens in uint16."""
    count = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    boundaries = np.arange(count + 1, dtype=np.int64).tobytes()
    return (
        Header("uint16", count, count).pack()
        + lengths.tobytes()
        + (2 * (ends - lengths)).tobytes()
        + boundaries
    )


def shard_record(name: str, tokens: int, documents: int, index_bytes: int) -> Shard:
    """The manifest's record of such a shard, without valid checksums."""
    return Shard(
        name, tokens, documents, FileRecord(2 * tokens, "0"), FileRecord(index_bytes, "0"), FileRecord(0, "0")
    )


def random_tokens(folder: Path, tokens: int, document_tokens: int = 800) -> Manifest:
    """A data directory of one shard with `tokens` random ids in documents of about `document_tokens`."""
    template = _template(folder)
    choose = np.random.default_rng(0)
    lengths = []
    folder.mkdir()
    with (folder / "train-00000.bin").open("wb") as file:
        for first in range(0, tokens, _BLOCK_TOKENS):
            size = min(_BLOCK_TOKENS, tokens - first)
            ids = choose.integers(0, template.encoding.end_of_text, size, dtype=np.uint16)
            ends = np.unique(np.append(choose.integers(1, size, size // document_tokens), size))
            ids[ends - 1] = template.encoding.end_of_text
            lengths.append(np.diff(ends, prepend=0).astype(np.int32))
            ids.tofile(file)
    return _finish(folder, template, np.concatenate(lengths))


def hollow_tokens(folder: Path, documents: int, document_tokens: int) -> Manifest:
    """A data directory of one shard of `documents`. Its .bin file is a hole; its index is complete."""
    template = _template(folder)
    folder.mkdir()
    with (folder / "train-00000.bin").open("wb") as file:
        file.truncate(2 * documents * document_tokens)
    return _finish(folder, template, np.full(documents, document_tokens, np.int32))


def _template(folder: Path) -> Manifest:
    return prepared(folder.with_name(f"{folder.name}-template"), ["one"], val_fraction=0)


def _finish(folder: Path, template: Manifest, lengths: NDArray[np.int32]) -> Manifest:
    index = _index_of(lengths)
    (folder / "train-00000.idx").write_bytes(index)
    (folder / "train-00000.sum").touch()
    shard = shard_record("train-00000", int(lengths.sum(dtype=np.int64)), len(lengths), len(index))
    manifest = replace(template, train=(shard,))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest
