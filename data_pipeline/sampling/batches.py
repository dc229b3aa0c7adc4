"""(step, rank, world size) → token ids and document ends. Pure, and the same sequences for every world size.

The order of sequences is a function of the seed and the sequence number; a rank's batch is a slice of it.
Nothing is carried from one batch to the next but open files and a memo, so any step can be asked for at any
time. Needs numpy alone.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.dataset.token_stream import TokenStream
from data_pipeline.errors import DataError, DataExhausted
from data_pipeline.sampling.batch import Batch, BatchBuilder
from data_pipeline.sampling.batch_schedule import BatchSizes
from data_pipeline.sampling.mixture import Mixture
from data_pipeline.sampling.packing import PackedRows
from data_pipeline.sampling.skip_list import Ranges, SkipList

# B sequences, T context. The order is looked up this many sequences at a time: a lookup costs 0.1 ms of
# numpy calls alone or in thousands.
_MEMO = 4096

Packing = Literal["stream", "best-fit"]


def windows_in(tokens: int, context: int) -> int:
    """How many sequences of `context` inputs and one more target a stream of `tokens` makes."""
    return max(0, tokens - 1) // context


class BatchReader:
    """The training batches of one or several data directories.

    Each source's training shards, end to end, are cut into windows of `context` inputs and one more target;
    what is left at the end makes no window. With `packing` "best-fit" the same tokens are packed into as many
    rows of whole documents. `sources` are (data directory, weight); with several, sequences
    are drawn in the proportion of the weights; `later` and `caps` are a Mixture's. `global_batch` sequences
    make a step, or as many as its ramp says. `skipped` are ranges [first, stop) of sequence numbers that are
    passed over. With `document_mask` attention segments end with documents and a document's first token is
    not scored; without it each row is one segment.

    Raises DataError where a directory is no data set, a shard is not as recorded, the encodings of two
    sources differ, or a source has no whole window.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path, float]],
        *,
        context: int,
        global_batch: int | BatchSizes,
        seed: int,
        document_mask: bool = True,
        later: Sequence[tuple[int, Sequence[float]]] = (),
        caps: Sequence[float | None] = (),
        max_epochs: float | None = None,
        skipped: Sequence[tuple[int, int]] = (),
        packing: Packing = "stream",
    ) -> None:
        manifests = [read_manifest(folder) for folder, _ in sources]
        for (folder, _), manifest in zip(sources, manifests, strict=True):
            if manifest.encoding.fingerprint != manifests[0].encoding.fingerprint:
                raise DataError(
                    f"{folder} was prepared with tokenizer {manifest.encoding.name!r} and {sources[0][0]} "
                    f"with {manifests[0].encoding.name!r}: their ids mean different text and cannot be mixed"
                )
        self._folders = [folder for folder, _ in sources]
        self._streams = [
            TokenStream(folder, manifest, "train")
            for folder, manifest in zip(self._folders, manifests, strict=True)
        ]
        self._context = context
        self._sizes = BatchSizes(global_batch) if isinstance(global_batch, int) else global_batch
        self._document_mask = document_mask
        windows = [windows_in(stream.tokens, context) for stream in self._streams]
        for folder, stream, count in zip(self._folders, self._streams, windows, strict=True):
            if count == 0:
                raise DataError(
                    f"{folder}: {stream.tokens} training tokens are less than one sequence of context "
                    f"{context} + 1; prepare more text or set a smaller model.context"
                )
        self._packed = [PackedRows(stream, context) for stream in self._streams if packing == "best-fit"]
        self.sequences_per_epoch = sum(windows)
        self.tokens = sum(stream.tokens for stream in self._streams)
        self._mixture = Mixture(windows, [weight for _, weight in sources], seed, later=later, caps=caps)
        self._max_epochs = max_epochs
        self._limit = None if max_epochs is None else self._mixture.length(max_epochs)
        self._skipped = SkipList(skipped)
        self._memo: tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        """The sequences that `rank` trains on at optimizer step `step`, the first being step 1.

        Pure: over all the ranks of any world size the union is the same, in rank order. Raises DataExhausted
        past the last epoch.
        """
        size = self._sizes.at(step) if step >= 1 else self._sizes.final
        if step < 1 or not 0 <= rank < world_size or size % world_size:
            raise ValueError(f"step {step}, rank {rank} of {world_size}, {size} sequences a step")
        count = size // world_size
        first = self._sizes.until(step - 1) + rank * count
        self._require(step)
        numbers, sources, windows = self._order(first, first + count)
        batch = BatchBuilder(count, self._context, self._document_mask)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            if self._packed:
                batch.fill_parts(row, self._streams[source], self._packed[source].parts(window))
            else:
                batch.fill(row, self._streams[source], window * self._context)
        return batch.finish(numbers)

    def epochs_at(self, step: int) -> float:
        """How often the source that is read most has been read once step `step` is done."""
        return max(self._mixture.epochs(self.numbers_behind(step)))

    def counts_at(self, step: int) -> list[int]:
        """How many sequences of each source are behind step `step`; skipped ones count as read."""
        return self._mixture.counts(self.numbers_behind(step))

    def numbers_behind(self, step: int) -> int:
        """How many sequence numbers are used or passed over once step `step` is done."""
        return self._skipped.numbers_behind(self._sizes.until(step))

    @property
    def skipped(self) -> Ranges:
        """The ranges [first, stop) of sequence numbers that are passed over, in order."""
        return self._skipped.ranges

    def skip(self, ranges: Iterable[tuple[int, int]], step: int) -> None:
        """Pass over `ranges` too after `step`. Raises ConfigError for one that begins before."""
        self._skipped = self._skipped.extended(ranges, step, self._sizes.until(step))
        self._memo = None

    def _require(self, step: int) -> None:
        behind, end = self.numbers_behind(step), self._mixture.end
        if end is not None and behind > end:
            raise DataExhausted(
                f"step {step} would read past sequence {end}, where the last source that has a weight comes "
                f"to its max_epochs; train fewer steps, prepare more text, or raise a max_epochs"
            )
        if self._limit is None:
            return
        length, source = self._limit
        if behind > length:
            raise DataExhausted(
                f"step {step} would read {self._folders[source]} more than data.max_epochs = "
                f"{self._max_epochs:g} times; prepare more text, train fewer steps, or raise data.max_epochs"
            )

    def _order(self, first: int, stop: int) -> tuple[NDArray[np.int64], ...]:
        """(sequence number, source, window) of the places [first, stop) in the order of use."""
        parts = []
        while first < stop:
            block = first // _MEMO
            if self._memo is None or self._memo[0] != block:
                used = np.arange(block * _MEMO, (block + 1) * _MEMO, dtype=np.int64)
                numbers = self._skipped.numbers(used)
                self._memo = (block, numbers, *self._mixture.locate(numbers))
            here = slice(first - block * _MEMO, min(stop - block * _MEMO, _MEMO))
            parts.append([column[here] for column in self._memo[1:]])
            first = (block + 1) * _MEMO
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
