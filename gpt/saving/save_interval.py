"""When a checkpoint is due: by steps, by the clock, or where lost work and stalls cost least together.

The optimum is Young's (1974) with Daly's correction (2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", equation 37), from what a save costs the steps and how often the run
fails. Time of day decides here, on rank 0 alone, and travels to the others with the tick of a boundary.
"""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any, Self

from gpt.config.run import CheckpointConfig
from gpt.run import record
from gpt.run.events import Event
from gpt.run.run_dir import RunDir

# Kokolis et al., arXiv:2410.21680: 6.5 failures per 1,000 node-days on the larger of two research clusters.
FAILURES_PER_NODE_SECOND = 6.5e-3 / 86_400
_FIRST_STALL_S = 1.0  # until one is measured
_SAVES_APART = 2.0  # durations of a save between two beginnings, so that few are skipped


def best_interval_s(stall_s: float, time_between_failures_s: float) -> float:
    """Seconds of work between saves that cost `stall_s` each, at which the expected loss is least."""
    ratio = stall_s / (2 * time_between_failures_s)
    if ratio >= 1:
        return time_between_failures_s
    return sqrt(2 * stall_s * time_between_failures_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall_s


def time_between_failures_s(nodes: int, failures: int, seconds: float) -> float:
    """Expected seconds between failures, after `failures` in `seconds` of this run.

    The prior counts as one failure that was seen: the posterior mean rate of a Gamma prior of weight one.
    """
    prior_s = 1 / (nodes * FAILURES_PER_NODE_SECOND)
    return (prior_s + seconds) / (1 + failures)


def failures_so_far(events: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """How many earlier attempts of a run ended without being asked to, and the seconds of all of them."""
    failures, seconds = 0, 0.0
    started: float | None = None
    last = 0.0
    has_ended = False
    for event in events:
        if event["event"] == Event.ATTEMPT_STARTED:
            if started is not None:
                failures += not has_ended
                seconds += last - started
            started, has_ended = event["time"], False
        has_ended = has_ended or event["event"] in (Event.FINISHED, Event.STOPPED)
        last = event["time"]
    return failures, seconds


class SaveClock:
    """The seconds between two saves, by what the config asks for; for rank 0."""

    def __init__(self, config: CheckpointConfig, failure_interval_s: float, now: float) -> None:
        self._config, self._failure_interval_s, self._begun = config, failure_interval_s, now
        self._stall_s, self._save_s = _FIRST_STALL_S, 0.0

    @classmethod
    def of_run(cls, run_dir: RunDir, config: CheckpointConfig, nodes: int, now: float) -> Self:
        """The clock of a run on `nodes` nodes, with the failures that the run has had so far."""
        failures, seconds = failures_so_far(record.read(run_dir.events))
        return cls(config, time_between_failures_s(nodes, failures, seconds), now)

    @property
    def interval_s(self) -> float | None:
        """Seconds from the beginning of one save to the next; None where steps alone decide."""
        config = self._config
        wanted = [60 * config.every_minutes] if config.every_minutes is not None else []
        if config.interval == "auto":
            best = max(best_interval_s(self._stall_s, self._failure_interval_s), _SAVES_APART * self._save_s)
            # What is being written when a node fails is lost too.
            wanted.append(max(0.0, min(best, 60 * config.max_lost_minutes - self._save_s)))
        return min(wanted, default=None)

    def is_due(self, now: float) -> bool:
        """Whether a save should begin at the next boundary."""
        return self.interval_s is not None and now - self._begun >= self.interval_s

    def begun(self, now: float) -> None:
        """A save begins."""
        self._begun = now

    def saved(self, stall_s: float, seconds: float) -> None:
        """A save was committed `seconds` after it began, and held the steps up for `stall_s`."""
        self._stall_s, self._save_s = stall_s, seconds
