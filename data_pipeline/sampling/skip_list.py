"""The skip list: sequence numbers that are left out on purpose. It is part of the config and the checkpoint.

After a loss spike, a run resumes from an earlier checkpoint and skips what it read at the spike. The list
determines which sequence is used at which position of the order, so it may only change positions that have
not been used. A change that would shift positions already used is refused. Nothing here reads a file.
"""

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]


class SkipList:
    """The sequence numbers in `ranges`, each [first, stop). A lookup takes O(log ranges).

    The attribute `ranges` is sorted and merged. Raises ValueError for a range that is empty or negative.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        merged: list[tuple[int, int]] = []
        for first, stop in sorted(ranges):
            if not 0 <= first < stop:
                raise ValueError(f"skipped range [{first}, {stop}): it needs 0 <= first < stop")
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((first, stop))
        self.ranges: Ranges = tuple(merged)
        # The position of the first number after each range, and how many numbers are skipped before it.
        self._positions: list[int] = []
        self._skipped: list[int] = [0]
        for first, stop in merged:
            self._positions.append(first - self._skipped[-1])
            self._skipped.append(self._skipped[-1] + stop - first)

    def number(self, position: int) -> int:
        """The sequence number that is used at `position`."""
        return position + self._skipped[bisect_right(self._positions, position)]

    def numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequence numbers that are used at `positions`."""
        index = np.searchsorted(np.array(self._positions, dtype=np.int64), positions, side="right")
        return positions + np.array(self._skipped, dtype=np.int64)[index]

    def numbers_consumed(self, positions: int) -> int:
        """The number of sequence numbers used or skipped once the first `positions` positions are used."""
        return self.number(positions - 1) + 1 if positions else 0

    def extended(self, ranges: Iterable[tuple[int, int]], step: int, positions: int) -> "SkipList":
        """This list extended by `ranges`, when `step` has used the first `positions` positions.

        Raises ConfigError for a new range that begins among the consumed numbers: skipping it now would not
        undo that it was read, and would change which sequences come next.
        """
        consumed = self.numbers_consumed(positions)
        wanted = SkipList((*self.ranges, *ranges))
        problems = [
            f"data.skip: [{first}, {stop}] begins among the first {consumed} sequences, which the run has "
            f"read by step {step}. Resume from an earlier checkpoint (outlast resume --step), or begin the "
            f"range at {consumed} or later."
            for first, stop in _without(wanted.ranges, self.ranges)
            if first < consumed
        ]
        if problems:
            raise ConfigError(problems)
        return wanted


def _without(ranges: Ranges, others: Ranges) -> Iterable[tuple[int, int]]:
    """Yields the parts of `ranges` that `others`, a subset of them, does not contain; both are merged."""
    for first, stop in ranges:
        for other_first, other_stop in others:
            if other_stop <= first or other_first >= stop:
                continue
            if other_first > first:
                yield first, other_first
            first = other_stop
        if first < stop:
            yield first, stop
