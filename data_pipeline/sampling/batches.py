"""The training batches: (step, rank, world size) → token ids and document ends.

The order of the sequences is a function of the seed and the sequence number, and a rank's batch is a slice of
it. So every world size reads the same sequences. A reader carries nothing from one batch to the next except
open files and a memo, so batches may be read in any order. Needs only numpy.
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

# The order is computed for this many sequences at a time: numpy's calls take 0.1 ms for one or for thousands.
_MEMO = 4096

Packing = Literal["stream", "best-fit"]


def windows_in(tokens: int, context: int) -> int:
    """The number of sequences, of `context` inputs and one more target, in a stream of `tokens`."""
    return max(0, tokens - 1) // context


class BatchReader:
    """Reads the training batches of one or several data directories.

    The training shards of each source, concatenated, are cut into windows of `context` inputs and one more
    target; a remainder at the end is dropped. With `packing` "best-fit", the same tokens are packed into as
    many rows of whole documents.

    `sources` are pairs (data directory, weight). Sequences are drawn from several sources in proportion to
    their weights; for `later` and `caps` see Mixture. A step has `global_batch` sequences, or as many as its
    schedule says. `skipped` are ranges [first, stop) of sequence numbers to leave out. With `document_mask`,
    attention segments end with documents, and the first token of a document is not scored; without it, each
    row is one segment.

    Raises DataError if a directory is not a data set, a shard differs from the manifest, two sources have
    different encodings, or a source has less than one window.
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
        self._folders = [folder for folder, _ in sources]
        self._streams = _open_streams(self._folders)
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
        self.tokens = sum(stream.tokens for stream in self._streams)
        self._mixture = Mixture(windows, [weight for _, weight in sources], seed, later=later, caps=caps)
        self._max_epochs = max_epochs
        self._limit = None if max_epochs is None else self._mixture.length(max_epochs)
        self._skipped = SkipList(skipped)
        self._memo: tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        """The sequences that `rank` trains on at optimizer step `step`; the first step is 1.

        Pure: the batches of all ranks, in rank order, are the same for any world size. Raises DataExhausted
        past the last epoch.
        """
        size = self._sizes.at(step) if step >= 1 else self._sizes.final
        if step < 1 or not 0 <= rank < world_size or size % world_size:
            raise ValueError(f"step {step}, rank {rank} of {world_size}, {size} sequences a step")
        count = size // world_size
        first = self._sizes.until(step - 1) + rank * count
        self._require_data(step)
        numbers, sources, windows = self._order(first, first + count)
        batch = BatchBuilder(count, self._context, self._document_mask)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            if self._packed:
                batch.fill_parts(row, self._streams[source], self._packed[source].parts(window))
            else:
                batch.fill(row, self._streams[source], window * self._context)
        return batch.finish(numbers)

    def counts_at(self, step: int) -> list[int]:
        """The number of sequences of each source that are used or skipped once `step` is done."""
        return self._mixture.counts(self.numbers_consumed(step))

    def numbers_consumed(self, step: int) -> int:
        """The number of sequence numbers that are used or skipped once `step` is done."""
        return self._skipped.numbers_consumed(self._sizes.until(step))

    @property
    def skipped(self) -> Ranges:
        """The ranges [first, stop) of skipped sequence numbers, in order."""
        return self._skipped.ranges

    def skip(self, ranges: Iterable[tuple[int, int]], step: int) -> None:
        """Also skip `ranges` after `step`. Raises ConfigError for a range that begins before."""
        self._skipped = self._skipped.extended(ranges, step, self._sizes.until(step))
        self._memo = None

    def _require_data(self, step: int) -> None:
        consumed, end = self.numbers_consumed(step), self._mixture.end
        if end is not None and consumed > end:
            raise DataExhausted(
                f"step {step} would read past sequence {end}, where the last source with a weight reaches "
                f"its max_epochs; train fewer steps, prepare more text, or raise a max_epochs"
            )
        if self._limit is None:
            return
        length, source = self._limit
        if consumed > length:
            raise DataExhausted(
                f"step {step} would read {self._folders[source]} more than data.max_epochs = "
                f"{self._max_epochs:g} times; prepare more text, train fewer steps, or raise data.max_epochs"
            )

    def _order(self, first: int, stop: int) -> tuple[NDArray[np.int64], ...]:
        """(sequence number, source, window) of the positions [first, stop) in the order of use."""
        parts = []
        while first < stop:
            block = first // _MEMO
            if self._memo is None or self._memo[0] != block:
                positions = np.arange(block * _MEMO, (block + 1) * _MEMO, dtype=np.int64)
                numbers = self._skipped.numbers(positions)
                self._memo = (block, numbers, *self._mixture.locate(numbers))
            here = slice(first - block * _MEMO, min(stop - block * _MEMO, _MEMO))
            parts.append([column[here] for column in self._memo[1:]])
            first = (block + 1) * _MEMO
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _open_streams(folders: Sequence[Path]) -> list[TokenStream]:
    """The training splits of `folders`. Raises DataError if their encodings differ."""
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.encoding.fingerprint != manifests[0].encoding.fingerprint:
            raise DataError(
                f"{folder} was prepared with tokenizer {manifest.encoding.name!r} and {folders[0]} with "
                f"{manifests[0].encoding.name!r}: their ids mean different text, so they cannot be mixed"
            )
    return [
        TokenStream(folder, manifest, "train") for folder, manifest in zip(folders, manifests, strict=True)
    ]
