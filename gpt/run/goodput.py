"""Where the wall-clock time of a run went: disjoint categories that add up, from its events and its record.

Time outside the training loop is cut at the events. Within the loop, the steps that count, the waits for
data, the evaluations and the stops for saves are measured by themselves, and what they leave is `unknown`.
Clocks may step: no part is ever negative.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpt.run.events import Event


class Category(StrEnum):
    """What the time was spent on."""

    PRODUCTIVE = "productive"  # steps that are part of the run
    REPEATED = "repeated"  # steps that were lost and had to be computed again
    LEFT_OUT = "left_out"  # steps whose update was left out, because its gradient was not finite
    DATA = "data_wait"
    EVALUATION = "evaluation"
    SAVING = "checkpoint_stall"
    FINAL_SAVE = "final_save"
    QUEUE = "queue"
    START = "start"  # processes, imports, rendezvous, node check, building the network
    COMPILE = "compile"
    LOAD = "load"
    HANG = "hang"  # until the watchdog found it
    RECOVERY = "recovery"  # from the last sign of an attempt until its workers are started again
    DOWN = "down"  # stopped or finished, until a person continues
    UNKNOWN = "unknown"


Seconds = dict[Category, float]
_ENDS = (Event.FINISHED, Event.STOPPED, Event.FAILED, Event.INTERRUPTED)
_PHASES = {"load": Category.LOAD, "compile": Category.COMPILE}
_FIRST_STEP = "first_step"


@dataclass
class AttemptTime:
    """One attempt: its number, when it began to start and when it ended, how, and where its time went."""

    number: int
    start: float
    end: float = 0.0
    how: str = "killed"
    cause: str = ""
    world_size: int = 0
    seconds: Seconds = field(default_factory=dict)
    loop_start: float | None = None  # the end of its last phase before the loop
    last_line: float = 0.0  # the time of its last step that counts


@dataclass(frozen=True)
class Goodput:
    """The time of a run from its submission to `until`, in all and attempt by attempt.

    What belongs to no attempt (queues, recoveries, rests) is in `between`.
    """

    start: float
    until: float
    attempts: Sequence[AttemptTime]
    between: Seconds

    @property
    def seconds(self) -> Seconds:
        """Seconds of each category over the whole run; they add up to `wall_s`."""
        total = dict(self.between)
        for attempt in self.attempts:
            for category, seconds in attempt.seconds.items():
                total[category] = total.get(category, 0.0) + seconds
        return total

    @property
    def wall_s(self) -> float:
        """The seconds from the submission to `until`."""
        return self.until - self.start

    @property
    def share(self) -> float:
        """The productive share of the time, without the times at which a person let the run rest."""
        seconds = self.seconds
        active_s = self.wall_s - seconds.get(Category.DOWN, 0.0)
        return seconds.get(Category.PRODUCTIVE, 0.0) / active_s if active_s > 0 else 0.0

    @property
    def processor_hours(self) -> tuple[float, float]:
        """Hours of all processes: those that were productive, and those from starting to ending attempts."""
        productive = sum(a.world_size * a.seconds.get(Category.PRODUCTIVE, 0.0) for a in self.attempts)
        return productive / 3600, sum(a.world_size * (a.end - a.start) for a in self.attempts) / 3600

    @property
    def failures(self) -> list[AttemptTime]:
        """The attempts that ended otherwise than by finishing or by a stop request, without a running one."""
        return [a for a in self.attempts if a.how not in (Event.FINISHED, Event.STOPPED, "running")]


def goodput(
    events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]], now: float, *, is_running: bool
) -> Goodput | None:
    """Where the time went, from checked `events` and the checked lines of metrics.jsonl; None without events.

    A run that `is_running` is counted until `now`.
    """
    timeline = _Timeline()
    for event in events:
        timeline.add(event)
    if timeline.start is None:
        return None
    timeline.close(now if is_running else None)
    _fill(timeline.attempts, steps, timeline)
    return Goodput(timeline.start, timeline.at, timeline.attempts, timeline.between)


class _Timeline:
    """Cuts the time at the events: every moment goes to an attempt's start or loop, or between attempts."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.at = 0.0  # everything before has been given to a category
        self.attempts: list[AttemptTime] = []
        self.between: Seconds = {}
        self.stalls: dict[int, float] = {}  # seconds of each attempt
        self.repeated: dict[int, float] = {}
        self.left_out: set[int] = set()
        self._waiting = Category.QUEUE  # what the time until the next attempt is
        self._phases: list[tuple[float, float, str]] = []  # before the attempt has its number
        self._is_open = False

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        name, time = event["event"], float(event["time"])
        if self.start is None:
            self.start = self.at = time
        time = max(time, self.at)  # a clock may be set back
        match name:
            case Event.SUBMITTED | Event.REQUEUED:
                self._end(self.at if self._is_open else time)
                self._pass(time, self._waiting)
                self._waiting = Category.QUEUE
            case Event.JOB_RUN_STARTED:
                self._end(self.at)
                self._pass(time, self._waiting)
                self._waiting = Category.START
            case Event.PHASE:
                self._phase(event, time)
            case Event.ATTEMPT_STARTED:
                self._begin(event, time)
            case Event.HANG:
                self._hang(time)
            case Event.CHECKPOINT_SAVED:
                self._sign(time)
                self._add_to(self.stalls, event.get("stall_s"))
            case Event.CONTINUED:
                self._note_repeated(event)
                self._sign(time)
            case Event.UPDATE_SKIPPED:
                self.left_out.add(event["step"])
                self._sign(time)
            case _ if name in _ENDS:
                self._sign(time)
                if self._is_open:
                    self.attempts[-1].how, self.attempts[-1].cause = name, event.get("cause", "")
                self._end(time)
                self._waiting = (
                    Category.DOWN if name in (Event.FINISHED, Event.STOPPED) else Category.RECOVERY
                )
            case _:
                pass

    def close(self, now: float | None) -> None:
        """The history ends: now, for a run that is going on."""
        if now is not None and self._is_open:
            self.attempts[-1].how = "running"
            self._sign(max(now, self.at))
        self._end(self.at)
        if now is not None:
            self._pass(max(now, self.at), self._waiting)

    def _pass(self, time: float, category: Category) -> None:
        """Give the time until `time` to `category`, between attempts."""
        if time > self.at:
            self.between[category] = self.between.get(category, 0.0) + time - self.at
            self.at = time

    def _phase(self, event: Mapping[str, Any], time: float) -> None:
        begin = max(self.at, time - event.get("seconds", 0.0))
        if self._is_open and self.attempts[-1].loop_start is None:
            attempt = self.attempts[-1]
            if event["name"] == _FIRST_STEP:
                attempt.loop_start = self.at
                return
            self._give(attempt, begin, Category.START)
            self._give(attempt, time, _PHASES.get(event["name"], Category.START))
        else:  # of the next attempt
            self._end(self.at)
            self._phases.append((begin, time, event["name"]))

    def _begin(self, event: Mapping[str, Any], time: float) -> None:
        self._end(self.at)
        begin = self._phases[0][0] if self._phases else time
        self._pass(begin, self._waiting)
        attempt = AttemptTime(event["attempt"], self.at, world_size=event.get("world_size", 0))
        self.attempts.append(attempt)
        self._is_open = True
        self._give(attempt, time, Category.START)
        self._phases = []

    def _give(self, attempt: AttemptTime, time: float, category: Category) -> None:
        if time > self.at:
            attempt.seconds[category] = attempt.seconds.get(category, 0.0) + time - self.at
            self.at = time

    def _sign(self, time: float) -> None:
        """The newest attempt was alive at `time`."""
        if self._is_open:
            attempt = self.attempts[-1]
            if attempt.loop_start is None:
                self._give(attempt, time, Category.START)
            self.at = max(self.at, time)
            attempt.end = self.at

    def _hang(self, time: float) -> None:
        """The newest attempt hung until `time`."""
        if self._is_open:
            self.attempts[-1].how = Event.HANG
            self._end(self.at)
            self._pass(time, Category.HANG)
            self._waiting = Category.RECOVERY

    def _end(self, time: float) -> None:
        """The newest attempt has ended, at the latest at `time`."""
        if self._is_open:
            self._is_open = False
            attempt = self.attempts[-1]
            attempt.end = max(attempt.end, time)
            if attempt.how == "killed":
                self._waiting = Category.RECOVERY

    def _add_to(self, sums: dict[int, float], seconds: float | None) -> None:
        if self.attempts and seconds is not None:
            number = len(self.attempts) - 1
            sums[number] = sums.get(number, 0.0) + max(0.0, seconds)

    def _note_repeated(self, event: Mapping[str, Any]) -> None:
        """Steps of the attempt before are computed again; it lived at least until the last of them."""
        if len(self.attempts) > 1 and event.get("repeated_s"):
            self.repeated[len(self.attempts) - 2] = event["repeated_s"]


def _fill(attempts: Sequence[AttemptTime], steps: Iterable[Mapping[str, Any]], timeline: _Timeline) -> None:
    """Divide the loop of each attempt by its steps."""
    loops: list[Seconds] = [{} for _ in attempts]
    number = 0
    for line in steps:
        while number + 1 < len(attempts) and line["time"] >= attempts[number + 1].start:
            number += 1
        if not attempts:
            return
        attempts[number].last_line = line["time"]
        waited = max(0.0, line.get("data/wait_seconds") or 0.0)
        stepped = max(0.0, (line.get("train/step_seconds") or 0.0) - waited)
        kind = Category.LEFT_OUT if line["step"] in timeline.left_out else Category.PRODUCTIVE
        for category, seconds in (
            (kind, stepped),
            (Category.DATA, waited),
            (Category.EVALUATION, max(0.0, line.get("val/seconds") or 0.0)),
        ):
            loops[number][category] = loops[number].get(category, 0.0) + seconds
    for index, (attempt, loop) in enumerate(zip(attempts, loops, strict=True)):
        if attempt.loop_start is None:
            continue
        if index + 1 < len(attempts):
            _extend(attempt, timeline.repeated.get(index, 0.0), attempts[index + 1].start, timeline.between)
        loop[Category.SAVING] = timeline.stalls.get(index, 0.0)
        loop[Category.REPEATED] = timeline.repeated.get(index, 0.0)
        if attempt.how in (Event.FINISHED, Event.STOPPED) and attempt.last_line:
            loop[Category.FINAL_SAVE] = max(0.0, attempt.end - max(attempt.last_line, attempt.loop_start))
        whole = max(0.0, attempt.end - attempt.loop_start)
        measured = sum(loop.values())
        scale = min(1.0, whole / measured) if measured else 0.0
        for category, seconds in loop.items():
            if seconds:
                attempt.seconds[category] = attempt.seconds.get(category, 0.0) + scale * seconds
        if whole > scale * measured:
            attempt.seconds[Category.UNKNOWN] = whole - scale * measured


def _extend(attempt: AttemptTime, repeated_s: float, limit: float, between: Seconds) -> None:
    """Let a killed attempt last until the last step that it took, of which no event tells."""
    category = Category.HANG if attempt.how == Event.HANG else Category.RECOVERY
    longer = min(attempt.last_line + repeated_s, limit) - attempt.end
    longer = min(longer, between.get(category, 0.0))
    if longer > 0:
        attempt.end += longer
        between[category] -= longer
