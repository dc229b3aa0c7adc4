"""A discrete-event simulation of a run under failures: many replicas of the run at once, event by event.

Between two interruptions a run starts, loads its checkpoint, trains, and saves every `save_interval_s`.
Interruptions arrive at random with a constant rate (a Poisson process), also while the run starts. A failure
throws the run back to its newest committed checkpoint. A preemption saves first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

from launcher.simulation.scenario import Scenario

Floats = NDArray[np.float64]

CATEGORIES = ("productive", "repeated", "saving", "detecting", "queueing", "starting")
_HOPELESS = 50.0  # a run that takes this many times its work is given up
_MOST_EVENTS = 100_000
_NEVER_S = 1e18


@dataclass(frozen=True)
class Outcome:
    """What the replicas took: seconds, one entry a replica; infinite where the run would not end."""

    work_s: float
    wall_s: Floats
    interruptions: Floats
    seconds: Mapping[str, Floats]  # by category; they add up to `wall_s` where it is finite

    @property
    def has_ended(self) -> bool:
        """Whether every replica ended."""
        return bool(np.isfinite(self.wall_s).all())

    @property
    def goodput(self) -> Floats:
        """The share of the time that was productive, for each replica."""
        return self.work_s / self.wall_s

    def share(self, category: str) -> float:
        """The mean share of the time that went to one of `CATEGORIES`."""
        return float(self.seconds[category].sum() / sum(part.sum() for part in self.seconds.values()))


def simulate(scenario: Scenario, replicas: int = 200, seed: int = 0) -> Outcome:
    """Simulate `replicas` independent runs; the same seed draws the same interruptions."""
    random = np.random.default_rng(seed)
    runs = _Replicas(scenario, replicas)
    for _ in range(0 if _is_hopeless(scenario) else _MOST_EVENTS):
        if not runs.going.any():
            break
        # All replicas draw at every event, so that scenarios with one seed see the same fate.
        runs.advance(*_draws(random, replicas))
    runs.wall_s[runs.going] = np.inf
    return Outcome(scenario.work_s, runs.wall_s, runs.interruptions, runs.seconds)


def _is_hopeless(scenario: Scenario) -> bool:
    """Whether the run would take more than `_HOPELESS` times its work (Daly 2006, equation 13)."""
    rate, period_s = scenario.interruption_rate, scenario.save_interval_s
    exponent = rate * (scenario.start_s + scenario.load_s + min(period_s, scenario.work_s))
    return rate > 0 and exponent > 1 and exp(min(exponent, 700.0)) > _HOPELESS * rate * period_s + 1


def _draws(random: np.random.Generator, replicas: int) -> Iterator[Floats]:
    """Two exponential and three uniform numbers for each replica."""
    yield from random.exponential(size=(2, replicas))
    yield from random.random((3, replicas))


class _Replicas:
    def __init__(self, scenario: Scenario, count: int) -> None:
        self._scenario = scenario
        self._left = np.full(count, scenario.work_s)
        self._spare_from = np.zeros((count, scenario.spare_nodes))  # when each spare node can be used
        self.going = np.full(count, scenario.work_s > 0)
        self.wall_s = np.zeros(count)
        self.interruptions = np.zeros(count)
        self.seconds = {name: np.zeros(count) for name in CATEGORIES}

    def advance(
        self, next_interruption: Floats, wait: Floats, is_preempted: Floats, is_hang: Floats, is_lost: Floats
    ) -> None:
        """Go on to the next interruption, or to the end; the arguments are random numbers."""
        scenario, going = self._scenario, self.going
        rate = scenario.interruption_rate
        until = next_interruption / rate if rate else np.full_like(next_interruption, _NEVER_S)
        start_s = scenario.start_s + scenario.load_s
        period_s, stall_s = scenario.save_interval_s, scenario.stall_s
        trained_s = np.maximum(0.0, until - start_s)
        saves = np.floor(np.nextafter(self._left, 0) / (period_s - stall_s))  # the last one is counted apart
        needed_s = self._left + saves * stall_s
        ends = going & (trained_s >= needed_s)
        self._spend("productive", ends, self._left)
        self._spend("saving", ends, saves * stall_s + scenario.save_s)
        self._spend("starting", ends, start_s)

        fails = going & ~ends
        whole, rest = np.divmod(trained_s, period_s)
        done = whole * (period_s - stall_s) + np.minimum(rest, period_s - stall_s)
        stalled = trained_s - done
        committed = np.clip(np.floor((trained_s + stall_s - scenario.save_s) / period_s), 0, whole)
        preempted = is_preempted * rate < scenario.preemption_rate
        kept = np.where(preempted, done, committed * (period_s - stall_s))
        self._spend("productive", fails, kept)
        self._spend("repeated", fails, done - kept)
        self._spend("saving", fails, stalled + np.where(preempted & (trained_s > 0), scenario.save_s, 0.0))
        self._spend("starting", fails, np.minimum(until, start_s))
        found_s = np.where(is_hang < scenario.hangs, scenario.hang_s, scenario.detect_s)
        self._spend("detecting", fails & ~preempted, found_s)
        waits = preempted | (
            (is_lost < scenario.needs_other_node) & ~self._take_spare(fails, is_lost, preempted)
        )
        self._spend("queueing", fails & waits, wait * scenario.queue_s)
        self._spare_from[fails & waits] = 0.0  # the new job has working nodes

        self._left[fails] -= kept[fails]
        self.interruptions[fails] += 1
        self.going &= ~ends
        hopeless = self.going & (self.wall_s > _HOPELESS * scenario.work_s + 1000 * start_s)
        self.wall_s[hopeless] = np.inf
        self.going &= ~hopeless

    def _spend(self, category: str, which: NDArray[np.bool_], seconds: Floats | float) -> None:
        spent = np.where(which, seconds, 0.0)
        self.seconds[category] += spent
        self.wall_s += spent

    def _take_spare(
        self, fails: NDArray[np.bool_], is_lost: Floats, preempted: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Whether a spare node replaces the failed one of each replica."""
        if not self._scenario.spare_nodes:
            return np.zeros_like(fails)
        first = self._spare_from.argmin(axis=1)
        rows = np.arange(len(first))
        wanted = fails & ~preempted & (is_lost < self._scenario.needs_other_node)
        taken: NDArray[np.bool_] = wanted & (self._spare_from[rows, first] <= self.wall_s)
        self._spare_from[rows[taken], first[taken]] = self.wall_s[taken] + self._scenario.repair_s
        return taken
