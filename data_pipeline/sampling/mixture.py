"""The global order of the training sequences: (sizes, weights, seed) and a sequence number → source, window.

The sources take turns in a fixed pattern of PERIOD slots. The pattern spreads each source as evenly as whole
numbers allow, so any stretch of the order contains each source's share within a few sequences. A permutation
per source and epoch determines the window that a turn reads, so every window is read once per epoch. A lookup
takes O(1) memory and time. Nothing here reads a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sampling.permutation import Permutation

# Shares are multiples of 1/PERIOD: a weight of 0.01 is off by at most 0.08% of itself.
PERIOD = 1 << 16


@dataclass(frozen=True)
class _Phase:
    """The numbers from `start` on, with one pattern of turns, after `before` sequences of each source."""

    start: int
    before: tuple[int, ...]
    turns: tuple[int, ...]
    source_at: NDArray[np.int64]
    turn_at: NDArray[np.int64]

    def counts(self, stop: int) -> tuple[int, ...]:
        """The number of sequences of each source before number `stop`, which is in this phase."""
        periods, rest = divmod(stop - self.start, PERIOD)
        partial = np.bincount(self.source_at[:rest], minlength=len(self.turns))
        in_phase = (periods * turns + int(more) for turns, more in zip(self.turns, partial, strict=True))
        return tuple(b + more for b, more in zip(self.before, in_phase, strict=True))

    def end_of(self, source: int, quota: int) -> int | None:
        """The number at which `source` would be read again after `quota` of its sequences; None if never."""
        if not self.turns[source]:
            return None
        periods, turn = divmod(quota - self.before[source], self.turns[source])
        slot = int(np.flatnonzero(self.source_at == source)[turn])
        return self.start + periods * PERIOD + slot


class Mixture:
    """The order over sources of `sizes` windows each, in proportion to `weights`.

    Each (n, weights) of `later`, with increasing n, changes the weights from number n on. A source with a cap
    in `caps` is read for at most that many epochs; then the other sources take its share. `end` is the number
    of sequences until every source with a weight has reached its cap, or None if some source has no cap.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        later: Sequence[tuple[int, Sequence[float]]] = (),
        caps: Sequence[float | None] = (),
    ) -> None:
        stages = [(0, weights), *later]
        if min(sizes) < 1 or any(
            len(stage_weights) != len(sizes)
            or min(stage_weights) < 0
            or not sum(stage_weights)
            or start <= previous
            for (start, stage_weights), (previous, _) in zip(stages, [(-1, ()), *stages], strict=False)
        ):
            raise ValueError(f"a mixture of {list(sizes)} windows with weights {stages}")
        self._sizes = list(sizes)
        self._seed = seed
        quotas = {
            source: int(cap * size)
            for source, (size, cap) in enumerate(zip(sizes, caps, strict=False))
            if cap is not None
        }
        self._phases, self.end = _phases(stages, quotas)
        self._starts = np.array([phase.start for phase in self._phases], dtype=np.int64)

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each sequence number, and the window in that source; any shape."""
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
        """The number of sequences of each source among the first `stop`."""
        phase = self._phases[max(0, int(np.searchsorted(self._starts, stop, side="left")) - 1)]
        return list(phase.counts(stop))

    def length(self, max_epochs: float) -> tuple[int, int] | None:
        """The number of sequences before a source is read more than `max_epochs` times, and that source."""
        stops = [phase.start for phase in self._phases[1:]] + [self.end]
        for phase, stop in zip(self._phases, stops, strict=True):
            ends = [
                (end, source)
                for source, size in enumerate(self._sizes)
                if (end := phase.end_of(source, int(max_epochs * size))) is not None
                and (stop is None or end < stop)
            ]
            if ends:
                return min(ends)
        return None

    def _locate_turns(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each number, and how often that source was read before."""
        phase_of = np.searchsorted(self._starts, numbers, side="right") - 1
        sources, turns = np.empty_like(numbers), np.empty_like(numbers)
        for index in np.unique(phase_of):
            phase, here = self._phases[index], phase_of == index
            periods, slots = np.divmod(numbers[here] - phase.start, PERIOD)
            found = phase.source_at[slots]
            sources[here] = found
            before = np.array(phase.before, dtype=np.int64)
            per_period = np.array(phase.turns, dtype=np.int64)
            turns[here] = before[found] + periods * per_period[found] + phase.turn_at[slots]
        return sources, turns


def _phases(
    stages: Sequence[tuple[int, Sequence[float]]], quotas: dict[int, int]
) -> tuple[list[_Phase], int | None]:
    """The phases of an order, and the number at which it ends: a phase ends where weights change.

    Weights change at the next stage, and when a source reaches its quota of sequences.
    """
    phases: list[_Phase] = []
    number = 0
    before: tuple[int, ...] = (0,) * len(stages[0][1])
    for stage, (_, weights) in enumerate(stages):
        stop = stages[stage + 1][0] if stage + 1 < len(stages) else None
        while stop is None or number < stop:
            left = [
                0.0 if source in quotas and before[source] >= quotas[source] else weight
                for source, weight in enumerate(weights)
            ]
            if not sum(left):
                return phases, number
            turns = _turns(left)
            phase = _Phase(number, before, turns, *_pattern(turns))
            phases.append(phase)
            ends = [phase.end_of(source, quota) for source, quota in quotas.items() if left[source]]
            ends += [stop]
            until = min((end for end in ends if end is not None), default=None)
            if until is None:
                return phases, None
            number, before = until, phase.counts(until)
    raise AssertionError("the last stage has no end")


def _turns(weights: Sequence[float]) -> tuple[int, ...]:
    """The number of slots of each source: at least one per source with a weight, by largest remainder."""
    shares = np.array(weights) / sum(weights) * PERIOD
    turns = np.maximum(np.array(weights) > 0, np.floor(shares)).astype(np.int64)
    by_remainder = np.argsort(-(shares - turns), kind="stable")
    missing = PERIOD - int(turns.sum())
    if missing >= 0:
        turns[by_remainder[:missing]] += 1
    else:  # tiny weights were rounded up to one slot; the largest source gives up as many
        turns[np.argmax(turns)] += missing
    return tuple(int(count) for count in turns)


def _pattern(turns: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each slot, and which of its turns the slot is: turn k of n is placed near (k + ½) / n."""
    sources = np.repeat(np.arange(len(turns)), turns)
    turn = np.concatenate([np.arange(count) for count in turns])
    ideal = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
    order = np.argsort(ideal, kind="stable")
    return sources[order].astype(np.int64), turn[order].astype(np.int64)
