"""What the events of a run say about its attempts: how long each one ran, what ended it, and what that cost.

A run that fails starts again by itself, or by a person's `resume`. A run that a person has stopped, or that
has finished, continues when that person wants: such a pause is neither a failure nor lost time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt.run.events import Event

# The launcher writes these between two attempts: they do not belong to the one before.
_BETWEEN = (
    Event.SUBMITTED,
    Event.JOB_RUN_STARTED,
    Event.REQUEUED,
    Event.WORKERS_CRASHED,
    Event.CONFIG_CHANGED,
    Event.FORKED,
    Event.IMPORTED,
)
_ENDS = (Event.FINISHED, Event.STOPPED, Event.FAILED, Event.INTERRUPTED)
# What `past_attempts` needs for everything but `seconds`.
ATTEMPT_EVENTS = (Event.ATTEMPT_STARTED, Event.CONTINUED, Event.SUBMITTED, *_ENDS)


@dataclass
class PastAttempt:
    """One attempt, as far as the events tell."""

    is_restart: bool  # it follows a failure or a preemption, and not a pause
    seconds: float = 0.0  # from its start to the last that is known of it
    has_failed: bool = True  # until an event says that it finished or was stopped
    lost_s: float = 0.0  # between the last step that was kept and its start, without the pauses


def past_attempts(events: Iterable[Mapping[str, Any]]) -> list[PastAttempt]:
    """The attempts of a run, oldest first, from its `events` as `read_events` yields them."""
    found: list[PastAttempt] = []
    started = time = 0.0
    end: Mapping[str, Any] | None = None  # the event that ended the newest attempt
    is_over = True  # what follows does not belong to the newest attempt
    is_resumed = False  # a person has continued the run after a pause, and no attempt has started since
    paused_until: float | None = None  # the same, until an attempt has loaded a checkpoint
    for event in events:
        name, time = event["event"], event["time"] or time
        if name == Event.ATTEMPT_STARTED:
            found.append(PastAttempt(is_restart=bool(found) and not is_resumed))
            started, end, is_over, is_resumed = time, None, False, False
        elif name == Event.SUBMITTED and end is not None and _leaves_the_run_at_rest(end):
            paused_until, end, is_resumed = time, None, True
        elif name == Event.CONTINUED and len(found) > 1:
            found[-1].lost_s += _lost_s(event, found[-1], time, paused_until)
            paused_until = None
        if is_over or name in _BETWEEN:
            is_over = True
            continue
        found[-1].seconds = max(0.0, time - started)
        if name in _ENDS:
            end, is_over = event, True
            is_failure = name in (Event.FAILED, Event.INTERRUPTED)
            found[-1].has_failed = is_failure and not event.get("requested")
    return found


def _leaves_the_run_at_rest(end: Mapping[str, Any]) -> bool:
    """Whether a run that ended so waits for a person, and not because something is broken."""
    return end["event"] != Event.FAILED or bool(end.get("requested"))


def _lost_s(
    continued: Mapping[str, Any], attempt: PastAttempt, time: float, paused_until: float | None
) -> float:
    """Seconds of work that is repeated, and of waiting for a restart. A clock may have been set back."""
    if not attempt.is_restart:
        return max(0.0, float(continued.get("repeated_s", 0.0)))
    lost_s = max(0.0, float(continued.get("lost_s", 0.0)))
    return lost_s if paused_until is None else min(lost_s, max(0.0, time - paused_until))
