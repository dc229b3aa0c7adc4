"""A running job watched from the outside: what its record says, as it grows, and how it ended.

Only files are read: the watcher may come and go without the run noticing. It asks a run to stop in one
way, the stop request, and kills nothing.
"""

import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt.run import record
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.runs.job_record import read_outcome
from launcher.runs.stop_request import request_stop
from launcher.scheduler.jobs import JobWatcher
from launcher.units import size

_POLL_S = 0.2
_PLAIN_LINE_S = 10.0
_RECENT_STEPS = 20


@dataclass(frozen=True)
class Update:
    """New whole lines of the record since the update before."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]


class Follower:
    """Reads a run's record from where it stood when the follower was made."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._offsets = {path: _size(path) for path in (run.metrics, run.events)}

    def updates(self, job: Job) -> Iterator[Update]:
        """An update every fifth of a second until `job` has ended, then the last one."""
        watcher = JobWatcher(self.run, job, serves_stop=True)
        while True:
            is_over = watcher.state() == "ended"
            yield Update(self._new(self.run.metrics), self._new(self.run.events))
            if is_over:
                return
            time.sleep(_POLL_S)

    def _new(self, path: Path) -> list[dict[str, Any]]:
        # A restart cuts the record back: what follows is appended behind the cut.
        self._offsets[path] = min(self._offsets[path], _size(path))
        lines = []
        for line, offset in record.read_from(path, self._offsets[path]):
            lines.append(line)
            self._offsets[path] = offset
        return lines


class Display:
    """Progress on standard error: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
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

    def __enter__(self) -> Self:
        if self._is_live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._progress.stop()

    def note(self, sentence: str) -> None:
        """A line above the bar."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    def show(self, update: Update) -> None:
        """What is new in the record."""
        for event in update.events:
            sentence = self._sentence(event)
            if sentence:
                self.note(sentence)
        for line in update.metrics:
            if "val/loss" in line:
                self.note(f"step {line['step']}: {_validation(line)}")
        if update.metrics:
            self._step_seconds.extend(float(line["train/step_seconds"]) for line in update.metrics)
            self._show_step(update.metrics[-1])

    def _show_step(self, line: dict[str, Any]) -> None:
        step = int(line["step"])
        left_s = (self.total_steps - step) * fmean(self._step_seconds)
        numbers = (
            f"loss {_number(line['train/loss'], '.3f')}  {line['train/tokens_per_second']:,.0f} tokens/s  "
            f"{duration(left_s)} left"
        )
        if self._is_live:
            self._progress.update(self._task, description="training", completed=step, numbers=numbers)
        elif time.monotonic() >= self._next_line or step == self.total_steps:
            self._next_line = time.monotonic() + _PLAIN_LINE_S
            self.note(f"step {step}/{self.total_steps}  {numbers}")

    def _sentence(self, event: dict[str, Any]) -> str | None:
        match event["event"]:
            case Event.ATTEMPT_STARTED:
                self._attempts += 1
                again = "the workers start again: " if self._attempts > 1 else ""
                return f"{again}attempt {event['attempt']}, {event['world_size']} processes"
            case Event.RESUMED:
                return f"continues from the checkpoint of step {event['step']}"
            case Event.CHECKPOINT_SAVED:
                return f"step {event['step']} is saved: {size(event['bytes'])} in {event['seconds']:.1f} s"
            case Event.CHECKPOINT_FAILED:
                return f"warning: step {event['step']} is not saved, training goes on: {event['reason']}"
            case Event.CHECKPOINT_SKIPPED:
                return f"warning: step {event['step']} is not saved: {event['reason']}"
            case Event.SAVING_SYNCHRONOUSLY:
                return f"warning: training waits for each save: {event['reason']}"
            case Event.CHECKPOINT_REJECTED:
                return f"warning: {event['path']} is passed over: {event['reason']}"
            case Event.UPDATE_SKIPPED:
                return f"warning: step {event['step']} left the weights as they were: {event['reason']}"
            case _:
                return None


_SECOND_THOUGHT_S = 1.0


class Attendance:
    """Signals while a job is watched: each saves and stops; a Ctrl-C later than that ends it at once.

    Schedulers and supervisors signal twice, and so does a key that is held: only a Ctrl-C that comes
    _SECOND_THOUGHT_S after the first signal means "at once".
    """

    def __init__(self, run: RunDir, display: Display) -> None:
        self._run, self._display = run, display
        self._asked_at: float | None = None
        self._is_urgent = False
        self._answered = 0

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def answer(self) -> None:
        """Act on what was pressed since the last call."""
        if self._answered == 0 and self._asked_at is not None:
            self._answered = 1
            request_stop(self._run, self._reason)
            self._display.note("saving, then stopping; Ctrl-C again ends it at once, without saving")
        if self._answered == 1 and self._is_urgent:
            self._answered = 2
            request_stop(self._run, "Ctrl-C twice", now=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # nobody may know how the job stands
            self._display.note("ending it without saving; Ctrl-C once more leaves it to itself")

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        elif number == signal.SIGINT and now - self._asked_at >= _SECOND_THOUGHT_S:
            self._is_urgent = True


def watch(run: RunDir, job: Job, follower: Follower, total_steps: int) -> JobOutcome:
    """Show `job` until it ends; Ctrl-C saves and stops it. How it ended."""
    with Display(total_steps) as display, Attendance(run, display) as attendance:
        for update in follower.updates(job):
            display.show(update)
            attendance.answer()
    return outcome_of(run, job)


def outcome_of(run: RunDir, job: Job) -> JobOutcome:
    """How an ended `job` ended, also when it could not say so itself."""
    folder = run.submission(job.submission).path
    lost = f"the job ended without a word, as when its node is lost; its logs: {folder}"
    return read_outcome(run, job) or JobOutcome(exit_code=ExitCode.FAILED, cause=lost, attempt=None)


def duration(seconds: float) -> str:
    """Seconds for people: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _validation(line: dict[str, Any]) -> str:
    text = f"validation loss {_number(line['val/loss'], '.4f')}"
    if "val/bits_per_byte" in line:
        text += f", {line['val/bits_per_byte']:.4f} bits per byte"
    return text


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
