"""Follows the record of a run from the outside: what is new in metrics.jsonl and events.jsonl.

Only files are read, so a follower can come and go without the run noticing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.run import record
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.scheduler.jobs import JobWatcher
from launcher.scheduler.protocol import JobState

_POLL_S = 0.2


@dataclass(frozen=True)
class Update:
    """The complete lines that were added to the record since the last update."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]


class RecordFollower:
    """Reads what is added to a run's record after the follower was created."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._offsets = {path: _size(path) for path in (run.metrics, run.events)}

    def updates(self, job: Job) -> Iterator[Update]:
        """An update every fifth of a second until `job` has ended, then a last one."""
        watcher = JobWatcher(self.run, job, serves_stop=True)
        while True:
            is_over = watcher.state() == JobState.ENDED
            yield Update(self._new(self.run.metrics), self._new(self.run.events))
            if is_over:
                return
            time.sleep(_POLL_S)

    def _new(self, path: Path) -> list[dict[str, Any]]:
        # A restart cuts the record back; new lines are then appended after the cut.
        self._offsets[path] = min(self._offsets[path], _size(path))
        lines = []
        for line, offset in record.read_from(path, self._offsets[path]):
            lines.append(line)
            self._offsets[path] = offset
        return lines


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
