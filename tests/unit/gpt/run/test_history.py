"""What the events say about attempts: failures cost time, and pauses that a person chose do not."""

from collections.abc import Iterator
from typing import Any

import pytest

from gpt.run.events import Event
from gpt.run.history import ATTEMPT_EVENTS, past_attempts

DAY = 86_400.0
START = Event.ATTEMPT_STARTED


def at(time: float, event: Event, **fields: Any) -> dict[str, Any]:
    return {"event": event.value, "time": time, **fields}


def first_attempt() -> Iterator[dict[str, Any]]:
    yield at(0.0, Event.SUBMITTED)
    yield at(1.0, Event.JOB_RUN_STARTED)
    yield at(10.0, START)
    yield at(100.0, Event.CHECKPOINT_SAVED, step=5)


def second_attempt(time: float, lost_s: float, repeated_s: float = 0.0) -> Iterator[dict[str, Any]]:
    yield at(time, START)
    yield at(time + 5, Event.CONTINUED, lost_s=lost_s, repeated_s=repeated_s)


@pytest.mark.parametrize("end", [Event.STOPPED, Event.FINISHED])
def test_a_pause_is_neither_a_restart_nor_lost_time(end: Event) -> None:
    events = [
        *first_attempt(),
        at(110.0, end, step=5),
        at(110.0 + 2 * DAY, Event.CONFIG_CHANGED),
        at(111.0 + 2 * DAY, Event.SUBMITTED),
        at(112.0 + 2 * DAY, Event.JOB_RUN_STARTED),
        *second_attempt(120.0 + 2 * DAY, lost_s=25.0 + 2 * DAY),
    ]
    first, second = past_attempts(events)
    assert (first.seconds, first.has_failed) == (100.0, False)
    assert (second.is_restart, second.lost_s, second.seconds) == (False, 0.0, 5.0)


def test_a_crash_is_a_restart_and_its_time_is_lost() -> None:
    events = [
        *first_attempt(),
        at(110.0, Event.FAILED, cause="killed"),
        *second_attempt(120.0, lost_s=25.0, repeated_s=10.0),
    ]
    first, second = past_attempts(events)
    assert (first.seconds, first.has_failed) == (100.0, True)
    assert (second.is_restart, second.lost_s) == (True, 25.0)


def test_a_preempted_job_that_comes_back_has_lost_the_wait() -> None:
    events = [
        *first_attempt(),
        at(110.0, Event.STOPPED, step=5),
        at(111.0, Event.REQUEUED),
        at(700.0, Event.JOB_RUN_STARTED),
        *second_attempt(710.0, lost_s=605.0),
    ]
    first, second = past_attempts(events)
    assert (first.seconds, first.has_failed) == (100.0, False)
    assert (second.is_restart, second.lost_s) == (True, 605.0)


def test_a_stop_without_saving_loses_the_work_but_not_the_pause() -> None:
    events = [
        *first_attempt(),
        at(110.0, Event.FAILED, cause="stopped at once", requested=True),
        at(110.0 + DAY, Event.SUBMITTED),
        *second_attempt(120.0 + DAY, lost_s=DAY + 25.0, repeated_s=10.0),
    ]
    first, second = past_attempts(events)
    assert (first.has_failed, second.is_restart, second.lost_s) == (False, False, 10.0)


def test_a_crash_right_after_a_pause_does_not_count_the_pause() -> None:
    events = [
        *first_attempt(),
        at(110.0, Event.STOPPED, step=5),
        at(110.0 + DAY, Event.SUBMITTED),
        at(120.0 + DAY, START),  # it dies before it has loaded the checkpoint
        *second_attempt(150.0 + DAY, lost_s=DAY + 55.0),
    ]
    _, second, third = past_attempts(events)
    assert (second.is_restart, second.has_failed) == (False, True)
    assert (third.is_restart, third.lost_s) == (True, 45.0)


def test_a_fork_has_not_lost_the_time_since_its_parent() -> None:
    events = [at(0.0, Event.FORKED), *second_attempt(10.0, lost_s=30 * DAY)]
    [only] = past_attempts(events)
    assert (only.is_restart, only.lost_s) == (False, 0.0)


def test_a_clock_that_was_set_back_gives_no_negative_time() -> None:
    events = [
        at(46 * DAY, START),
        at(10.0, Event.PHASE),
        at(20.0, Event.FAILED),
        *second_attempt(30.0, lost_s=-46 * DAY, repeated_s=-5.0),
        at(0.0, Event.PHASE),  # without a usable time
    ]
    first, second = past_attempts(events)
    assert (first.seconds, second.seconds, second.lost_s) == (0.0, 5.0, 0.0)


def test_the_events_of_attempts_tell_all_but_the_seconds() -> None:
    events = [*first_attempt(), at(110.0, Event.INTERRUPTED), at(120.0, Event.SUBMITTED)]
    events += second_attempt(130.0, lost_s=35.0, repeated_s=10.0)
    few = past_attempts(event for event in events if event["event"] in ATTEMPT_EVENTS)
    for one, other in zip(past_attempts(events), few, strict=True):
        assert (one.is_restart, one.has_failed, one.lost_s) == (
            other.is_restart,
            other.has_failed,
            other.lost_s,
        )
