"""Describes a data set for a person: the lengths of its documents, and a sample of its text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.integrity import check_shard
from data_pipeline.dataset.manifest import Manifest, Shard, Split
from data_pipeline.dataset.megatron_index import ITEM_BYTES
from data_pipeline.dataset.shards import IndexArrays
from data_pipeline.errors import DataError
from data_pipeline.sampling.permutation import Permutation
from data_pipeline.tokenizer.encoding import Encoding


@dataclass(frozen=True)
class LengthHistogram:
    """The documents of a split by length: `counts[k]` have 2^k to 2^(k+1) - 1 tokens, including end-of-text.

    `empty` counts the documents without any token, which Megatron's files may contain.
    """

    counts: tuple[int, ...]
    empty: int
    longest: int


def length_histogram(folder: Path, manifest: Manifest, split: Split) -> LengthHistogram:
    """The lengths of the documents of a split. Reads every index and no tokens. Raises DataError."""
    counts = np.zeros(64, dtype=np.int64)
    empty = longest = 0
    for shard in manifest.shards(split):
        lengths = _document_lengths(folder, shard, manifest.dtype)
        full = lengths[lengths > 0]
        empty += len(lengths) - len(full)
        if len(full):
            longest = max(longest, int(full.max()))
            # frexp gives the exact exponent; log2 rounds.
            counts += np.bincount(np.frexp(full.astype(np.float64))[1] - 1, minlength=64)
    used = max((int(k) + 1 for k in np.flatnonzero(counts)), default=0)
    return LengthHistogram(tuple(int(count) for count in counts[:used]), empty, longest)


def sample_documents(
    folder: Path, manifest: Manifest, split: Split, encoding: Encoding, count: int, seed: int = 0
) -> Iterator[tuple[str, int, str]]:
    """Yields (`shard:number`, tokens, text) of `count` documents of the split, which `seed` selects."""
    shards = manifest.shards(split)
    ends = np.cumsum([shard.documents for shard in shards])
    total = int(ends[-1]) if len(ends) else 0
    picks = Permutation(total, f"look/{seed}")(np.arange(min(count, total))) if total else np.empty(0)
    for pick in sorted(int(pick) for pick in picks):
        number = int(np.searchsorted(ends, pick, side="right"))
        shard = shards[number]
        document = pick - int(ends[number]) + shard.documents
        lengths = _document_lengths(folder, shard, manifest.dtype)
        stop = int(lengths[: document + 1].sum())
        tokens = int(lengths[document])
        offset = (stop - tokens) * ITEM_BYTES[manifest.dtype]
        ids = np.fromfile(folder / f"{shard.name}.bin", manifest.dtype, tokens, offset=offset)
        yield f"{shard.name}:{document}", len(ids), encoding.decode(ids.tolist())


def _document_lengths(folder: Path, shard: Shard, dtype: str) -> NDArray[np.int64]:
    problems = check_shard(folder, shard, dtype)
    if problems:
        raise DataError("\n".join(problems))
    return IndexArrays(folder / f"{shard.name}.idx").document_lengths()
