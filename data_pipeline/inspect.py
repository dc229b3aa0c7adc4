"""What a person wants to see of a data set: counts, how long its documents are, and some of its text."""

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
    """Documents of a split by length: `counts[k]` have 2^k to 2^(k+1) - 1 tokens, end-of-text included.

    Documents without any token, which Megatron's files may hold, are in `empty`.
    """

    counts: tuple[int, ...]
    empty: int
    longest: int


def length_histogram(folder: Path, manifest: Manifest, split: Split) -> LengthHistogram:
    """How long the documents of a split are; reads every index and no token. Raises DataError."""
    counts = np.zeros(64, dtype=np.int64)
    empty = longest = 0
    for shard in manifest.shards(split):
        found = _document_lengths(folder, shard, manifest.dtype)
        full = found[found > 0]
        empty += len(found) - len(full)
        if len(full):
            longest = max(longest, int(full.max()))
            # frexp gives the exact exponent, where log2 rounds.
            counts += np.bincount(np.frexp(full.astype(np.float64))[1] - 1, minlength=64)
    used = max((int(k) + 1 for k in np.flatnonzero(counts)), default=0)
    return LengthHistogram(tuple(int(count) for count in counts[:used]), empty, longest)


def sample_documents(
    folder: Path, manifest: Manifest, split: Split, encoding: Encoding, count: int, seed: int = 0
) -> Iterator[tuple[str, int, str]]:
    """(`shard:number`, tokens, text) of `count` documents from all over the split; another `seed`, others."""
    shards = manifest.shards(split)
    ends = np.cumsum([shard.documents for shard in shards])
    total = int(ends[-1]) if len(ends) else 0
    picks = Permutation(total, f"look/{seed}")(np.arange(min(count, total))) if total else np.empty(0)
    for pick in sorted(int(pick) for pick in picks):
        number = int(np.searchsorted(ends, pick, side="right"))
        shard = shards[number]
        inside = pick - int(ends[number]) + shard.documents
        of_shard = _document_lengths(folder, shard, manifest.dtype)
        stop = int(of_shard[: inside + 1].sum())
        tokens = int(of_shard[inside])
        offset = (stop - tokens) * ITEM_BYTES[manifest.dtype]
        ids = np.fromfile(folder / f"{shard.name}.bin", manifest.dtype, tokens, offset=offset)
        yield f"{shard.name}:{inside}", len(ids), encoding.decode(ids.tolist())


def _document_lengths(folder: Path, shard: Shard, dtype: str) -> NDArray[np.int64]:
    problems = check_shard(folder, shard, dtype)
    if problems:
        raise DataError("\n".join(problems))
    return IndexArrays(folder / f"{shard.name}.idx").document_lengths()
