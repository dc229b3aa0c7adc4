"""A batch of sequences, and how it is put together from the tokens of a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.token_stream import TokenStream


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    tokens int64 [B, T + 1]; column T is a target only.
    document_ends int32 [segments]: where attention segments end (exclusive) in the flattened [B·T] inputs;
    every row's end is one; strictly increasing, the last is B·T.
    scored bool [B, T]: the targets that count.
    sequence_numbers int64 [B]: places in the global order.
    """

    tokens: NDArray[np.int64]
    document_ends: NDArray[np.int32]
    scored: NDArray[np.bool_]
    sequence_numbers: NDArray[np.int64]

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """The same sequences in order, `size` at a time; the last batch has what is left."""
        count, context = self.scored.shape
        for first in range(0, count, size):
            stop = min(first + size, count)
            low, high = np.searchsorted(self.document_ends, [first * context, stop * context], side="right")
            yield Batch(
                tokens=self.tokens[first:stop],
                document_ends=self.document_ends[low:high] - np.int32(first * context),
                scored=self.scored[first:stop],
                sequence_numbers=self.sequence_numbers[first:stop],
            )


class BatchBuilder:
    """Rows read into place, with the segments that attention and loss need."""

    def __init__(self, count: int, context: int, document_mask: bool) -> None:
        self._context = context
        self._document_mask = document_mask
        self._tokens = np.empty((count, context + 1), dtype=np.int64)
        self._end_of_text: int | None = None
        self._by_index: list[tuple[int, NDArray[np.int64]]] = []
        self._short: list[tuple[int, int]] = []
        self._cuts: list[tuple[int, int]] = []  # (row, input) after which another part of the stream comes

    def fill(self, row: int, stream: TokenStream, start: int, targets: int | None = None) -> None:
        """Row `row` from token `start` on; past its first `targets` targets it is padding."""
        context = self._context
        targets = context if targets is None else targets
        real = targets + 1 if targets else 0
        stream.read(start if real else 0, self._tokens[row, :real])
        if targets < context:
            self._tokens[row, real:] = 0
            self._short.append((row, targets))
        if not self._document_mask:
            return
        if stream.end_of_text is not None:
            self._end_of_text = stream.end_of_text
        elif real:
            self._by_index.append((row, stream.document_starts(start + 1, start + real) - (start + 1)))

    def fill_parts(self, row: int, stream: TokenStream, parts: Sequence[tuple[int, int]]) -> None:
        """Row `row` from several parts [start, stop) of the stream; the last target is what follows them."""
        place = 0
        for start, stop in parts:
            stream.read(start, self._tokens[row, place : place + stop - start])
            place += stop - start
            self._cuts.append((row, place - 1))
        self._cuts.pop()
        stream.read(parts[-1][1], self._tokens[row, place:])
        if not self._document_mask:
            return
        if stream.end_of_text is not None:
            self._end_of_text = stream.end_of_text
            return
        place = 0
        for start, stop in parts:
            self._by_index.append((row, stream.document_starts(start + 1, stop + 1) - (start + 1) + place))
            place += stop - start

    def finish(self, numbers: NDArray[np.int64]) -> Batch:
        """The batch, whose rows are the sequences `numbers`."""
        # Whether a document, or what is real of the row, ends with this input. Its target is another's first
        # token and is not scored.
        inputs = self._tokens[:, :-1]
        is_end = inputs == (-1 if self._end_of_text is None else self._end_of_text)
        for row, _ in self._by_index:
            is_end[row] = False
        for row, lasts in self._by_index:
            is_end[row, lasts] = True
        if self._cuts and self._document_mask:
            is_end[tuple(np.array(self._cuts).T)] = True
        scored = ~is_end
        for row, targets in self._short:
            scored[row, targets:] = is_end[row, targets:] = False
            is_end[row, targets - 1 : targets] = True
        is_end[:, -1] = True
        ends = np.flatnonzero(is_end) + 1
        return Batch(self._tokens, ends.astype(np.int32), scored, numbers)
