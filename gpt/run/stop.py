"""Stop requests: signals and the file RUN/stop become one flag, and nothing else happens here.

A signal handler that saves would run in the middle of a step, on one rank. The flag is reduced over the
ranks at a step boundary (gpt.distributed.world), so that all of them save the same step.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

from gpt.run.run_dir import is_listed

# Slurm and torchrun send these to the whole process tree, each perhaps twice; the handler is idempotent.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.5  # the stop file may lie on a shared file system
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process has been asked to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._path: Path | None = None
        self._next_poll = 0.0

    def install(self) -> None:
        """Catch the stop signals. Before torch is imported: its import takes seconds."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def watch(self, path: Path) -> None:
        """Look at the stop file `path` too, at most every POLL_S seconds."""
        self._path = path

    def is_requested(self) -> bool:
        """Whether a signal came or the stop file stands."""
        now = time.monotonic()
        if self.reason is None and self._path is not None and now >= self._next_poll:
            self._next_poll = now + POLL_S
            if is_listed(self._path):
                self.reason = _file_reason(self._path)
        return self.reason is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no worker is ever orphaned."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _file_reason(path: Path) -> str:
    try:
        return str(json.loads(path.read_text()).get("reason") or "stop file")
    except (OSError, ValueError, AttributeError):
        return "stop file"
