"""Signals that reach a command while it starts or follows a job: the first one saves and stops the run."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import click

from gpt.run.run_dir import RunDir
from launcher.scheduler.jobs import ask_to_stop

_SECOND_CTRL_C_S = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals() -> Iterator[list[signal.Signals]]:
    """Hold Ctrl-C and SIGTERM back until the block has ended, and deliver them then.

    The block gets the list of the signals so far; what it removes from the list is not delivered.
    """
    held: list[signal.Signals] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: held.append(signal.Signals(number)))
        for number in _SIGNALS
    }
    try:
        yield held
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(held):
            signal.raise_signal(number)


def reason_of(number: signal.Signals) -> str:
    """What a stop request says about the signal that caused it."""
    return "Ctrl-C" if number == signal.SIGINT else number.name


class SignalGuard:
    """Turns signals into stop requests: the first saves and stops, a later Ctrl-C stops without saving.

    Schedulers and supervisors signal twice, and a held key repeats. Therefore only a Ctrl-C that comes
    _SECOND_CTRL_C_S after the first signal means "stop at once". The command itself is never interrupted
    until then; after that one more Ctrl-C ends the command and leaves the job running.
    """

    def __init__(self, run: RunDir, note: Callable[[str], None] | None = None) -> None:
        """`note` shows a sentence to the user, by default on standard error."""
        self._run = run
        self.note = note or (lambda sentence: click.echo(sentence, err=True))
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._first_signal: signal.Signals | None = None
        self._first_at = 0.0
        self._wants_now = False
        self._has_asked = self._has_asked_now = False

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def has_signal(self) -> bool:
        """Whether a signal has come."""
        return self._first_signal is not None

    def answer(self) -> None:
        """Request what the signals since the last call ask for; the run must have a job."""
        if self._first_signal is not None and not self._has_asked:
            self._has_asked = True
            ask_to_stop(self._run, reason_of(self._first_signal), self.note)
            self.note("saving, then stopping; press Ctrl-C again to stop at once without saving")
        if self._wants_now and not self._has_asked_now:
            self._has_asked_now = True
            # The scheduler may be silent: the user must be able to leave without an answer.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            ask_to_stop(self._run, "Ctrl-C twice", self.note, now=True)
            self.note("stopping without saving; press Ctrl-C once more to leave the job to itself")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal, self._first_at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._first_at >= _SECOND_CTRL_C_S:
            self._wants_now = True
