"""Follows the record of a run from the outside: what is new in metrics.jsonl and events.jsonl.

Only files are read, so a follower can come and go without the run noticing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt.run import record
from gpt.run.events import checked_event
from gpt.run.line_reader import LineReader
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.scheduler.jobs import JobWatcher
from launcher.scheduler.protocol import JobState

_POLL_S = 0.2


@dataclass(frozen=True)
class Update:
    """The complete lines that were added to the record since the last update.

    They are as `record.checked_step` and `checked_event` return them.
    """

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]


class RecordFollower:
    """Reads what is added to a run's record after the follower was created."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._metrics = LineReader(run.metrics, record.checked_step, from_end=True)
        self._events = LineReader(run.events, checked_event, from_end=True)

    def updates(self, job: Job) -> Iterator[Update]:
        """An update every fifth of a second until `job` has ended, then a last one."""
        watcher = JobWatcher(self.run, job, serves_stop=True)
        while True:
            is_over = watcher.state() == JobState.ENDED
            yield Update(_new(self._metrics), _new(self._events))
            if is_over:
                return
            time.sleep(_POLL_S)


def _new(reader: LineReader) -> list[dict[str, Any]]:
    lines = list(reader.unread())
    reader.mark_read()
    return lines
