"""A batch of sequences, and how it is assembled from the tokens of a stream.

B sequences, T tokens of context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.token_stream import TokenStream


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    tokens int64 [B, T + 1]: column T is only a target.
    document_ends int32 [segments]: the ends (exclusive) of the attention segments in the flattened [B·T]
    inputs. They increase strictly, every row ends with one, and the last is B·T.
    scored bool [B, T]: the targets that count in the loss.
    sequence_numbers int64 [B]: the positions in the global order.
    """

    tokens: NDArray[np.int64]
    document_ends: NDArray[np.int32]
    scored: NDArray[np.bool_]
    sequence_numbers: NDArray[np.int64]

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Yields the sequences in order, `size` at a time; the last batch has the remaining ones."""
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
    """Reads rows into a batch and computes the segments that attention and loss need."""

    def __init__(self, count: int, context: int, document_mask: bool) -> None:
        self._context = context
        self._document_mask = document_mask
        self._tokens = np.empty((count, context + 1), dtype=np.int64)
        self._end_of_text: int | None = None
        # (row, last inputs of documents) for rows whose document boundaries come from the index.
        self._from_index: list[tuple[int, NDArray[np.int64]]] = []
        self._short: list[tuple[int, int]] = []  # (row, number of targets) of rows that end with padding
        # (row, last input of a part) for every part that another part follows.
        self._part_ends: list[tuple[int, int]] = []

    def fill(self, row: int, stream: TokenStream, start: int, targets: int | None = None) -> None:
        """Fill `row` with the stream from token `start` on, and with padding after `targets` targets."""
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
            self._from_index.append((row, stream.document_starts(start + 1, start + real) - (start + 1)))

    def fill_parts(self, row: int, stream: TokenStream, parts: Sequence[tuple[int, int]]) -> None:
        """Fill `row` with the parts [start, stop) of the stream; the last target follows the last part."""
        place = 0
        for start, stop in parts:
            stream.read(start, self._tokens[row, place : place + stop - start])
            place += stop - start
            self._part_ends.append((row, place - 1))
        self._part_ends.pop()
        stream.read(parts[-1][1], self._tokens[row, place:])
        if not self._document_mask:
            return
        if stream.end_of_text is not None:
            self._end_of_text = stream.end_of_text
            return
        place = 0
        for start, stop in parts:
            self._from_index.append((row, stream.document_starts(start + 1, stop + 1) - (start + 1) + place))
            place += stop - start

    def finish(self, numbers: NDArray[np.int64]) -> Batch:
        """The batch; `numbers` are the sequence numbers of its rows."""
        # An input is an end if its document, or the unpadded part of its row, ends there. Its target is the
        # first token of another document, so it is not scored.
        inputs = self._tokens[:, :-1]
        is_end = inputs == (-1 if self._end_of_text is None else self._end_of_text)
        for row, _ in self._from_index:
            is_end[row] = False
        for row, lasts in self._from_index:
            is_end[row, lasts] = True
        if self._part_ends and self._document_mask:
            is_end[tuple(np.array(self._part_ends).T)] = True
        scored = ~is_end
        for row, targets in self._short:
            scored[row, targets:] = is_end[row, targets:] = False
            is_end[row, targets - 1 : targets] = True
        is_end[:, -1] = True
        ends = np.flatnonzero(is_end) + 1
        return Batch(self._tokens, ends.astype(np.int32), scored, numbers)
