"""One split of a data directory as one stream of tokens: its shards, concatenated.

Opening it reads the manifest and checks file sizes and headers. It scans no data and caches nothing on disk,
whatever the size of the corpus.
"""

import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.integrity import check_shard
from data_pipeline.dataset.manifest import Manifest, Split
from data_pipeline.dataset.shards import MappedShard
from data_pipeline.errors import DataError


class TokenStream:
    """The tokens [tokens] of one split.

    If every document ends with an end-of-text that occurs nowhere else, `end_of_text` is its id, and the
    tokens show the document boundaries. Otherwise `end_of_text` is None and `document_starts` finds the
    boundaries in the index. Raises DataError that names every shard that differs from the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        self._folder = folder
        self._dtype = manifest.dtype
        self._shards = manifest.shards(split)
        problems = [p for shard in self._shards for p in check_shard(folder, shard, manifest.dtype)]
        if problems:
            raise DataError(problems[0] if len(problems) == 1 else "\n".join(problems))
        self._ends = list(accumulate(shard.tokens for shard in self._shards))
        self._bases = [end - shard.tokens for end, shard in zip(self._ends, self._shards, strict=True)]
        self.end_of_text = manifest.encoding.end_of_text if manifest.is_ended_by_token else None
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        # Each mapped shard keeps two file descriptors open; the rest of the process needs most of them.
        self._most_open = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self.tokens = self._ends[-1] if self._ends else 0
        self.documents = sum(shard.documents for shard in self._shards)

    def read(self, start: int, out: NDArray[np.int64]) -> None:
        """Copy the tokens [start, start + len(out)) to `out`."""
        stop = start + len(out)
        index = bisect_right(self._ends, start)
        if 0 <= start < stop <= self.tokens and stop <= self._ends[index]:
            base = self._bases[index]
            out[:] = self._shard(index).ids[start - base : stop - base]
            return
        for shard, first, end, base in self._parts(start, stop):
            out[base + first - start : base + end - start] = shard.ids[first:end]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) of the stream at which documents start, strictly ascending."""
        parts = [s.document_starts(first, end) + base for s, first, end, base in self._parts(start, stop)]
        starts = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])
        # A document without tokens, which Megatron allows, starts at the same position as the next one.
        return np.unique(starts) if (starts[1:] == starts[:-1]).any() else starts

    def _parts(self, start: int, stop: int) -> Iterator[tuple[MappedShard, int, int, int]]:
        """Yields (shard, first token, stop, stream position of token 0) for each shard in [start, stop)."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        index = bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[index]
            base = self._bases[index]
            here = min(stop, end)
            if here > start:
                yield self._shard(index), start - base, here - base, base
            start = max(start, here)
            index += 1

    def _shard(self, index: int) -> MappedShard:
        shard = self._open.get(index)
        if shard is None:
            shard = MappedShard(self._folder, self._shards[index], self._dtype)
            self._open[index] = shard
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(index)
        return shard
