"""When a checkpoint is due by the clock: every so many minutes, or at the interval that costs the least time.

The optimum depends on how long a save stalls the training, on how often the run fails, and on how long it
takes to recover. Only rank 0 reads the clock; the other ranks learn its decision at a step boundary.
"""

from collections.abc import Iterable, Mapping
from math import sqrt
from statistics import median
from typing import Any, Self

from gpt.config.run import CheckpointConfig
from gpt.run.events import Event, read_events
from gpt.run.history import past_attempts
from gpt.run.run_dir import RunDir

# Kokolis et al., arXiv:2410.21680: 6.5 failures per 1,000 node-days on the larger of two research clusters.
FAILURES_PER_NODE_SECOND = 6.5e-3 / 86_400
RECOVERY_S = 60.0  # assumed until a start is measured
_FIRST_STALL_S = 1.0  # assumed until one is measured
_SAVES_APART = 2.0  # a save starts at most every two durations of a save, so that few are skipped


def best_interval_s(stall_s: float, time_between_failures_s: float, recovery_s: float) -> float:
    """The seconds from one save to the next that make the largest share of the time productive.

    `recovery_s` is the time from a failure to the next step. Saxena et al., "Optimal Checkpoint Interval with
    Availability as an Objective Function" (arXiv:2410.18124): Tc = Ts + sqrt(2 (Tf + Tr) Ts + Ts²). Without
    Tr it is Young's interval (1974).
    """
    return stall_s + sqrt(2 * (time_between_failures_s + recovery_s) * stall_s + stall_s**2)


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


def start_times_s(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """How long each attempt took from the start of its workers to its first step, as its phases say."""
    starts: list[float] = []
    for event in events:
        if event["event"] == Event.ATTEMPT_STARTED:
            starts.append(0.0)
        elif event["event"] == Event.PHASE and starts:
            starts[-1] += event.get("seconds", 0.0)
    return [seconds for seconds in starts if seconds]


class SaveClock:
    """Decides on rank 0 when the next save is due by the clock."""

    def __init__(
        self,
        config: CheckpointConfig,
        failure_interval_s: float,
        now: float,
        recovery_s: float = RECOVERY_S,
    ) -> None:
        self._config, self._failure_interval_s, self._begun = config, failure_interval_s, now
        self._recovery_s = recovery_s
        self._stall_s, self._save_s = _FIRST_STALL_S, 0.0

    @classmethod
    def of_run(cls, run_dir: RunDir, config: CheckpointConfig, nodes: int, now: float) -> Self:
        """The clock of a run on `nodes` nodes, with the failures that the run has had so far."""
        events = list(read_events(run_dir.events))
        failures, seconds = failures_so_far(events)
        recovery_s = median(start_times_s(events) or [RECOVERY_S])
        return cls(config, time_between_failures_s(nodes, failures, seconds), now, recovery_s)

    @property
    def interval_s(self) -> float | None:
        """Seconds from the start of one save to the start of the next; None when only steps decide."""
        config = self._config
        wanted = [60 * config.every_minutes] if config.every_minutes is not None else []
        if config.interval == "auto":
            best = max(
                best_interval_s(self._stall_s, self._failure_interval_s, self._recovery_s),
                _SAVES_APART * self._save_s,
            )
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
