"""The progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt.run.events import Event
from launcher.commands.record_follower import Update
from launcher.commands.terminal import without_echo_of_control_keys
from launcher.units import duration, printable, processes, size

_PLAIN_LINE_S = 10.0
_RECENT_STEPS = 20  # the remaining time is estimated from the mean of these


class Display:
    """Shows a run's steps as a bar, and its events as lines above the bar."""

    def __init__(self, total_steps: int, quiet: Collection[Event] = ()) -> None:
        """The events named in `quiet` are not shown."""
        self.total_steps, self._quiet = total_steps, quiet
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total_steps, numbers="")
        self._is_live = self.console.is_terminal
        self._next_line = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._attempts = 0
        self._doing: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._is_live:
            self._stack.enter_context(without_echo_of_control_keys())
            self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def note(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.print(printable(sentence), markup=False, emoji=False, soft_wrap=True)

    def describe(self, doing: str) -> None:
        """Say on the bar what the run is doing, in place of "training"."""
        self._doing = doing
        self._progress.update(self._task, description=doing)

    def show(self, update: Update) -> None:
        """Show what is new in the record."""
        for event in update.events:
            if event["event"] == Event.PHASE and self._doing is None:
                self._progress.update(self._task, description=f"starting, after {event.get('name')}")
            sentence = self._sentence(event)
            if sentence and event["event"] not in self._quiet:
                self.note(sentence)
        for line in update.metrics:
            if "val/loss" in line:
                self.note(f"step {line['step']}: {_validation(line)}")
        if update.metrics:
            seconds = (line.get("train/step_seconds") for line in update.metrics)
            self._step_seconds.extend(each for each in seconds if each is not None)
            self._show_step(update.metrics[-1])

    def _show_step(self, line: dict[str, Any]) -> None:
        step = int(line["step"])
        numbers = (
            f"loss {_number(line.get('train/loss'), '.3f')}  "
            f"{_number(line.get('train/tokens_per_second'), ',.0f')} tokens/s"
        )
        if self._step_seconds:
            left_s = max(0, self.total_steps - step) * fmean(self._step_seconds)
            numbers += f"  {duration(left_s)} left"
        if self._is_live:
            self._progress.update(
                self._task, description=self._doing or "training", completed=step, numbers=numbers
            )
        elif time.monotonic() >= self._next_line or step == self.total_steps:
            self._next_line = time.monotonic() + _PLAIN_LINE_S
            self.note(f"step {step}/{self.total_steps}  {numbers}")

    def _sentence(self, event: dict[str, Any]) -> str | None:
        match event["event"]:
            case Event.ATTEMPT_STARTED:
                self._attempts += 1
                what = "started" if self._attempts == 1 else "restarted the workers"
                return f"attempt {event['attempt']} {what} on {processes(event['world_size'])}"
            case Event.WORKERS_CRASHED:
                return f"warning: the workers crashed before an attempt began: {event['cause']}"
            case Event.HANG:
                return f"warning: the workers hang: {event['culprit']}"
            case Event.RESUMED:
                return f"resumed from the checkpoint of step {event['step']}"
            case Event.CHECKPOINT_SAVED:
                saved = f"saved the checkpoint of step {event['step']}"
                if "bytes" not in event or "seconds" not in event:
                    return saved
                return f"{saved}: {size(event['bytes'])} in {event['seconds']:.1f} s"
            case Event.CHECKPOINT_FAILED:
                return (
                    f"warning: saving the checkpoint of step {event['step']} failed, training continues: "
                    f"{event['reason']}"
                )
            case Event.CHECKPOINT_SKIPPED:
                return f"warning: the checkpoint of step {event['step']} was not saved: {event['reason']}"
            case Event.SAVING_SYNCHRONOUSLY:
                return f"warning: training waits while a checkpoint is written: {event['reason']}"
            case Event.CHECKPOINT_NOT_FINITE:
                return (
                    f"warning: the checkpoint of step {event['step']} is damaged: {event['reason']}; an "
                    "older one is kept"
                )
            case Event.CHECKPOINT_REJECTED:
                return f"warning: {event['path']} failed verification and is not used: {event['reason']}"
            case Event.UPDATE_SKIPPED:
                return f"warning: step {event['step']} did not update the weights: {event['reason']}"
            case _:
                return None


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _validation(line: dict[str, Any]) -> str:
    text = f"validation loss {_number(line['val/loss'], '.4f')}"
    if "val/bits_per_byte" in line:
        text += f", {_number(line['val/bits_per_byte'], '.4f')} bits per byte"
    return text
