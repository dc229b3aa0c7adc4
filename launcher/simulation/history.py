"""What earlier runs say about a cluster: how often they failed, and how long starts and saves took."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from gpt.run.events import Event, read_events
from gpt.run.run_dir import RunDir
from gpt.saving.save_interval import FAILURES_PER_NODE_SECOND, failures_so_far, start_times_s


@dataclass(frozen=True)
class History:
    """Observations of several runs. A time is None when it was never observed."""

    failures: int = 0
    node_seconds: float = 0.0
    start_s: float | None = None
    stall_s: float | None = None
    save_s: float | None = None

    @property
    def node_failure_rate(self) -> float:
        """Failures of one node in a second: the mean of the posterior under a prior of one failure.

        The prior's rate is that of Kokolis et al. (arXiv:2410.21680) on the larger of two research clusters.
        """
        return (1 + self.failures) / (1 / FAILURES_PER_NODE_SECOND + self.node_seconds)


def history_of(runs: Iterable[tuple[RunDir, int]]) -> History:
    """What happened in `runs`, each given with its number of nodes."""
    failures, node_seconds = 0, 0.0
    starts: list[float] = []
    saves: list[dict[str, Any]] = []
    for run, nodes in runs:
        events = list(read_events(run.events))
        failed, seconds = failures_so_far(events)
        failures, node_seconds = failures + failed, node_seconds + nodes * seconds
        starts += start_times_s(events)
        saves += [event for event in events if event["event"] == Event.CHECKPOINT_SAVED]
    return History(
        failures,
        node_seconds,
        start_s=median(starts) if starts else None,
        stall_s=_median_of(saves, "stall_s"),
        save_s=_median_of(saves, "seconds"),
    )


def _median_of(events: list[dict[str, Any]], field: str) -> float | None:
    """The median of a field over the events that have it."""
    found = [event[field] for event in events if field in event]
    return median(found) if found else None
