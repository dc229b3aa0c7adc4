"""Signals that reach a command while it follows a job: the first one saves and stops the run."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from gpt.run.run_dir import RunDir
from launcher.runs.stop_request import request_stop

_SECOND_CTRL_C_S = 1.0


class SignalGuard:
    """Turns signals into stop requests: the first saves and stops, a later Ctrl-C stops without saving.

    Schedulers and supervisors signal twice, and a held key repeats. Therefore only a Ctrl-C that comes
    _SECOND_CTRL_C_S after the first signal means "stop at once". The command itself is never interrupted
    until then; after that one more Ctrl-C ends the command and leaves the job running.
    """

    def __init__(self, run: RunDir, note: Callable[[str], None]) -> None:
        self._run, self._note = run, note
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._first_signal: signal.Signals | None = None
        self._first_at = 0.0
        self._wants_now = False
        self._has_asked = self._has_asked_now = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def answer(self) -> None:
        """Request what the signals since the last call ask for."""
        if self._first_signal is not None and not self._has_asked:
            self._has_asked = True
            reason = "Ctrl-C" if self._first_signal == signal.SIGINT else self._first_signal.name
            request_stop(self._run, reason)
            self._note("saving, then stopping; press Ctrl-C again to stop at once without saving")
        if self._wants_now and not self._has_asked_now:
            self._has_asked_now = True
            request_stop(self._run, "Ctrl-C twice", now=True)
            # The scheduler may be silent: the user must be able to leave without an answer.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._note("stopping without saving; press Ctrl-C once more to leave the job to itself")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal, self._first_at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._first_at >= _SECOND_CTRL_C_S:
            self._wants_now = True
