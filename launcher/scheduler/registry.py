"""The one place that chooses a scheduler, by the `kind` of a cluster file or the `executor` in job.json."""

from importlib import import_module

from data_pipeline.errors import LaunchError
from launcher.cluster import SCHEDULERS
from launcher.scheduler.protocol import Scheduler


def scheduler_of(kind: str) -> Scheduler:
    """The scheduler called `kind`. Raises LaunchError when there is none."""
    if kind not in SCHEDULERS:
        raise LaunchError(f"this version of Outlast has no scheduler {kind!r}, only {', '.join(SCHEDULERS)}")
    scheduler: Scheduler = import_module(SCHEDULERS[kind]).SCHEDULER
    return scheduler
