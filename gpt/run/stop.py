"""Stop requests as a worker sees them: signals and the file RUN/stop become one flag.

A signal handler that saves would run in the middle of a step, on one rank. Instead, the trainer reduces the
flag over the ranks at a step boundary, so that all of them save the same step.
"""

import signal
import time
from pathlib import Path
from types import FrameType

from gpt.run.json_file import is_listed

# Slurm and torchrun send these to the whole process tree, each perhaps twice; the handler is idempotent.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.5  # the stop file may be on a shared file system


class StopFlag:
    """Whether this process has been asked to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._path: Path | None = None
        self._next_poll = 0.0

    def install(self) -> None:
        """Catch the stop signals. Call it before torch is imported: that import takes seconds."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def watch(self, path: Path) -> None:
        """Look at the stop file `path` too, at most every POLL_S seconds."""
        self._path = path

    def is_requested(self) -> bool:
        """Whether a signal came or the stop file exists."""
        now = time.monotonic()
        if self.reason is None and self._path is not None and now >= self._next_poll:
            self._next_poll = now + POLL_S
            if is_listed(self._path):
                self.reason = _file_reason(self._path)
        return self.reason is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


def _file_reason(path: Path) -> str:
    from gpt.run.records import StopRequest  # not at the top: pydantic would delay the signal handlers

    return (StopRequest.read_or_none(path) or StopRequest()).reason or StopRequest().reason
