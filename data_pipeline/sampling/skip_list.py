"""Sequence numbers that are passed over on purpose: part of the order, of the config, and of the checkpoint.

After a loss spike a run goes back to a checkpoint before it and passes over what it read there. The list
decides which sequence stands in which place of the order of use, so it can only change for places that are
not used yet: whatever would move the ones behind is refused. Nothing here reads a file.
"""

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]


class SkipList:
    """The sequence numbers in `ranges`, each [first, stop): O(log ranges) a lookup.

    `ranges` are in order and apart, whatever they were given as. Raises ValueError for one that is no range.
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
        self._places: list[int] = []  # of the first number after each range, in the order of use
        self._before: list[int] = [0]  # numbers skipped up to there
        for first, stop in merged:
            self._places.append(first - self._before[-1])
            self._before.append(self._before[-1] + stop - first)

    def number(self, place: int) -> int:
        """The sequence number that is used in place `place`."""
        return place + self._before[bisect_right(self._places, place)]

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequence numbers that are used in `places`."""
        index = np.searchsorted(np.array(self._places, dtype=np.int64), places, side="right")
        return places + np.array(self._before, dtype=np.int64)[index]

    def numbers_behind(self, places: int) -> int:
        """How many sequence numbers are used or passed over once the first `places` places are used."""
        return self.number(places - 1) + 1 if places else 0

    def extended(self, ranges: Iterable[tuple[int, int]], step: int, places: int) -> "SkipList":
        """This list with `ranges` too, from a state on in which `step` has used the first `places` places.

        Raises ConfigError, naming it, for a range that begins among what is behind and is not in this list:
        passing over it now would not undo it, and would change which sequences come next.
        """
        behind = self.numbers_behind(places)
        wanted = SkipList((*self.ranges, *ranges))
        problems = [
            f"data.skip: [{first}, {stop}] begins among the {behind} sequences that are behind step {step}, "
            f"and those have been read. Continue from a checkpoint before it (outlast resume --step), or "
            f"begin the range at {behind} or later."
            for first, stop in _without(wanted.ranges, self.ranges)
            if first < behind
        ]
        if problems:
            raise ConfigError(problems)
        return wanted


def _without(ranges: Ranges, others: Ranges) -> Iterable[tuple[int, int]]:
    """What is in `ranges` and not in `others`, which lie in them; both in order and apart."""
    for first, stop in ranges:
        for gone_first, gone_stop in others:
            if gone_stop <= first or gone_first >= stop:
                continue
            if gone_first > first:
                yield first, gone_first
            first = gone_stop
        if first < stop:
            yield first, stop
