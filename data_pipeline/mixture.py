"""The global order of training sequences: (sizes, weights, seed) and a number → source and window.

Sources take turns in a fixed pattern of PERIOD slots in which each is spread as evenly as whole numbers
allow, so a window of any length holds each source's share within a few sequences. Which window of the source
a turn reads is a permutation of its own each epoch: every window once an epoch by construction. O(1)
memory and time a lookup; nothing here reads a file.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.permutation import Permutation

# Shares are multiples of 1/PERIOD: a weight of 0.01 is off by 0.08% of itself at most.
PERIOD = 1 << 16


class Mixture:
    """The order over sources of `sizes` windows each, in the proportion of `weights`."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if min(sizes) < 1 or min(weights) <= 0 or len(sizes) != len(weights):
            raise ValueError(f"a mixture of {list(sizes)} windows with weights {list(weights)}")
        self._sizes = list(sizes)
        self._seed = seed
        self._turns = _turns(weights)
        self._source_at, self._turn_at = _pattern(self._turns)

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source and the window in it of each sequence number, any shape."""
        sources, turns = self._locate_turns(numbers)
        windows = np.empty_like(turns)
        for source in np.unique(sources):
            here = sources == source
            epochs, positions = np.divmod(turns[here], self._sizes[source])
            found = np.empty_like(positions)
            for epoch in np.unique(epochs):
                permutation = Permutation(self._sizes[source], f"{self._seed}/{source}/{epoch}")
                found[epochs == epoch] = permutation(positions[epochs == epoch])
            windows[here] = found
        return sources, windows

    def counts(self, stop: int) -> list[int]:
        """How many sequences of each source are among the first `stop`."""
        periods, rest = divmod(stop, PERIOD)
        partial = np.bincount(self._source_at[:rest], minlength=len(self._sizes))
        return [int(periods * turns + more) for turns, more in zip(self._turns, partial, strict=True)]

    def epochs(self, stop: int) -> list[float]:
        """How often each source has been read after the first `stop` sequences."""
        return [count / size for count, size in zip(self.counts(stop), self._sizes, strict=True)]

    def length(self, max_epochs: float) -> tuple[int, int]:
        """How many sequences come before a source is read more than `max_epochs` times, and which one."""
        ends = []
        for source, size in enumerate(self._sizes):
            periods, turn = divmod(int(max_epochs * size), self._turns[source])
            slot = int(np.flatnonzero(self._source_at == source)[turn])
            ends.append(periods * PERIOD + slot)
        return min(ends), int(np.argmin(ends))

    def _locate_turns(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        periods, slots = np.divmod(numbers, PERIOD)
        sources = self._source_at[slots]
        return sources, periods * np.array(self._turns, dtype=np.int64)[sources] + self._turn_at[slots]


def _turns(weights: Sequence[float]) -> list[int]:
    """How many of PERIOD slots each source gets: at least one, the rest by largest remainder."""
    shares = np.array(weights) / sum(weights) * PERIOD
    turns = np.maximum(1, np.floor(shares)).astype(np.int64)
    by_remainder = np.argsort(-(shares - turns), kind="stable")
    missing = PERIOD - int(turns.sum())
    if missing >= 0:
        turns[by_remainder[:missing]] += 1
    else:  # tiny weights were rounded up to one turn: the largest source pays
        turns[np.argmax(turns)] += missing
    return [int(count) for count in turns]


def _pattern(turns: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each slot, and which of its turns it is: turn k of n stands near (k + ½) / n."""
    sources = np.repeat(np.arange(len(turns)), turns)
    turn = np.concatenate([np.arange(count) for count in turns])
    ideal = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
    order = np.argsort(ideal, kind="stable")
    return sources[order].astype(np.int64), turn[order].astype(np.int64)
