"""When a checkpoint is due by the clock: every so many minutes, or at the interval that costs the least time.

The optimum is Young's (1974) with Daly's correction (2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", equation 37). It depends on how long a save stalls the training and on
how often the run fails. Only rank 0 reads the clock; the other ranks learn its decision at a step boundary.
"""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any, Self

from gpt.config.run import CheckpointConfig
from gpt.run.events import read_events
from gpt.run.history import past_attempts
from gpt.run.run_dir import RunDir

# Kokolis et al., arXiv:2410.21680: 6.5 failures per 1,000 node-days on the larger of two research clusters.
FAILURES_PER_NODE_SECOND = 6.5e-3 / 86_400
_FIRST_STALL_S = 1.0  # assumed until one is measured
_SAVES_APART = 2.0  # a save starts at most every two durations of a save, so that few are skipped


def best_interval_s(stall_s: float, time_between_failures_s: float) -> float:
    """The seconds of work between saves of `stall_s` each that minimize the expected loss of time."""
    ratio = stall_s / (2 * time_between_failures_s)
    if ratio >= 1:
        return time_between_failures_s
    return sqrt(2 * stall_s * time_between_failures_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall_s


def time_between_failures_s(nodes: int, failures: int, seconds: float) -> float:
    """Expected seconds between failures on `nodes` nodes, after `failures` in `seconds` of this run.

    It is the inverse of the posterior mean rate under a Gamma prior that counts as one observed failure.
    """
    prior_s = 1 / (nodes * FAILURES_PER_NODE_SECOND)
    return (prior_s + seconds) / (1 + failures)


def failures_so_far(events: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """How many attempts of a run ended by a failure, and the seconds of all attempts, without the pauses."""
    earlier = past_attempts(events)[:-1]  # the last one still runs
    return sum(attempt.has_failed for attempt in earlier), sum(attempt.seconds for attempt in earlier)


class SaveClock:
    """Decides on rank 0 when the next save is due by the clock."""

    def __init__(self, config: CheckpointConfig, failure_interval_s: float, now: float) -> None:
        self._config, self._failure_interval_s, self._begun = config, failure_interval_s, now
        self._stall_s, self._save_s = _FIRST_STALL_S, 0.0

    @classmethod
    def of_run(cls, run_dir: RunDir, config: CheckpointConfig, nodes: int, now: float) -> Self:
        """The clock of a run on `nodes` nodes, with the failures that the run has had so far."""
        failures, seconds = failures_so_far(read_events(run_dir.events))
        return cls(config, time_between_failures_s(nodes, failures, seconds), now)

    @property
    def interval_s(self) -> float | None:
        """Seconds from the start of one save to the start of the next; None when only steps decide."""
        config = self._config
        wanted = [60 * config.every_minutes] if config.every_minutes is not None else []
        if config.interval == "auto":
            best = max(best_interval_s(self._stall_s, self._failure_interval_s), _SAVES_APART * self._save_s)
            # A save that is still being written when a node fails is lost as well.
            wanted.append(max(0.0, min(best, 60 * config.max_lost_minutes - self._save_s)))
        return min(wanted, default=None)

    def is_due(self, now: float) -> bool:
        """Whether a save should start at the next step boundary."""
        return self.interval_s is not None and now - self._begun >= self.interval_s

    def begun(self, now: float) -> None:
        """Note that a save starts."""
        self._begun = now

    def saved(self, stall_s: float, seconds: float) -> None:
        """Note that a save was committed `seconds` after it started and stalled training for `stall_s`."""
        self._stall_s, self._save_s = stall_s, seconds
