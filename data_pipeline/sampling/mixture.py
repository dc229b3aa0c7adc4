"""The global order of training sequences: (sizes, weights, seed) and a number → source and window.

Sources take turns in a fixed pattern of PERIOD slots in which each is spread as evenly as whole numbers
allow, so a window of any length holds each source's share within a few sequences. Which window of the source
a turn reads is a permutation of its own each epoch: every window once an epoch by construction. O(1)
memory and time a lookup; nothing here reads a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sampling.permutation import Permutation

# Shares are multiples of 1/PERIOD: a weight of 0.01 is off by 0.08% of itself at most.
PERIOD = 1 << 16


@dataclass(frozen=True)
class _Phase:
    """The numbers from `start` on: a pattern of turns, after `before` sequences of each source."""

    start: int
    before: tuple[int, ...]
    turns: tuple[int, ...]
    source_at: NDArray[np.int64]
    turn_at: NDArray[np.int64]

    def counts(self, stop: int) -> tuple[int, ...]:
        """How many sequences of each source come before number `stop` of this phase."""
        periods, rest = divmod(stop - self.start, PERIOD)
        partial = np.bincount(self.source_at[:rest], minlength=len(self.turns))
        of_phase = (periods * turns + int(more) for turns, more in zip(self.turns, partial, strict=True))
        return tuple(b + more for b, more in zip(self.before, of_phase, strict=True))

    def end_of(self, source: int, quota: int) -> int | None:
        """The number at which `source`, read `quota` times by then, would be read again; None for never."""
        if not self.turns[source]:
            return None
        periods, turn = divmod(quota - self.before[source], self.turns[source])
        slot = int(np.flatnonzero(self.source_at == source)[turn])
        return self.start + periods * PERIOD + slot


class Mixture:
    """The order over sources of `sizes` windows each, in the proportion of `weights`.

    From number n on, for each (n, weights) of `later`, which rises, other weights hold. A source that has an
    entry in `caps` is read so many times at most; from then on the others take its share. `end` is how many
    sequences there are before every source that has a weight has come to its cap, None where that is never.
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
            len(of) != len(sizes) or min(of) < 0 or not sum(of) or start <= before
            for (start, of), (before, _) in zip(stages, [(-1, ()), *stages], strict=False)
        ):
            raise ValueError(f"a mixture of {list(sizes)} windows with weights {stages}")
        self._sizes = list(sizes)
        self._seed = seed
        quotas = {
            source: int(cap * size)
            for source, (size, cap) in enumerate(zip(sizes, caps, strict=False))
            if cap is not None
        }
        self.end: int | None = None
        self._phases: list[_Phase] = []
        self._lay_out(stages, quotas)
        self._starts = np.array([phase.start for phase in self._phases], dtype=np.int64)

    def _lay_out(self, stages: Sequence[tuple[int, Sequence[float]]], quotas: dict[int, int]) -> None:
        number = 0
        before: tuple[int, ...] = (0,) * len(self._sizes)
        for stage, (_, weights) in enumerate(stages):
            stop = stages[stage + 1][0] if stage + 1 < len(stages) else None
            while stop is None or number < stop:
                left = [
                    0.0 if source in quotas and before[source] >= quotas[source] else weight
                    for source, weight in enumerate(weights)
                ]
                if not sum(left):
                    self.end = number
                    return
                turns = _turns(left)
                phase = _Phase(number, before, turns, *_pattern(turns))
                self._phases.append(phase)
                ends = [phase.end_of(source, quota) for source, quota in quotas.items() if left[source]]
                ends += [stop]
                until = min((end for end in ends if end is not None), default=None)
                if until is None:
                    return
                number, before = until, phase.counts(until)

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
        phase = self._phases[max(0, int(np.searchsorted(self._starts, stop, side="left")) - 1)]
        return list(phase.counts(stop))

    def epochs(self, stop: int) -> list[float]:
        """How often each source has been read after the first `stop` sequences."""
        return [count / size for count, size in zip(self.counts(stop), self._sizes, strict=True)]

    def length(self, max_epochs: float) -> tuple[int, int] | None:
        """How many sequences come before a source is read more than `max_epochs` times, and which one."""
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
        of_phase = np.searchsorted(self._starts, numbers, side="right") - 1
        sources, turns = np.empty_like(numbers), np.empty_like(numbers)
        for index in np.unique(of_phase):
            phase, here = self._phases[index], of_phase == index
            periods, slots = np.divmod(numbers[here] - phase.start, PERIOD)
            found = phase.source_at[slots]
            sources[here] = found
            before, per_period = (np.array(of, dtype=np.int64) for of in (phase.before, phase.turns))
            turns[here] = before[found] + periods * per_period[found] + phase.turn_at[slots]
        return sources, turns


def _turns(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of PERIOD slots each source of weight gets: at least one, the rest by largest remainder."""
    shares = np.array(weights) / sum(weights) * PERIOD
    turns = np.maximum(np.array(weights) > 0, np.floor(shares)).astype(np.int64)
    by_remainder = np.argsort(-(shares - turns), kind="stable")
    missing = PERIOD - int(turns.sum())
    if missing >= 0:
        turns[by_remainder[:missing]] += 1
    else:  # tiny weights were rounded up to one turn: the largest source pays
        turns[np.argmax(turns)] += missing
    return tuple(int(count) for count in turns)


def _pattern(turns: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each slot, and which of its turns it is: turn k of n stands near (k + ½) / n."""
    sources = np.repeat(np.arange(len(turns)), turns)
    turn = np.concatenate([np.arange(count) for count in turns])
    ideal = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
    order = np.argsort(ideal, kind="stable")
    return sources[order].astype(np.int64), turn[order].astype(np.int64)
