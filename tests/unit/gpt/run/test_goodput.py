"""Goodput adds up whatever happened, and finds what is known to have happened."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.run.events import Event
from gpt.run.goodput import Category, goodput

Line = dict[str, Any]


def at(time: float, event: Event, **fields: Any) -> Line:
    return {"time": time, "event": event.value, **fields}


def step(time: float, number: int, seconds: float = 1.0, **fields: float) -> Line:
    return {"time": time, "step": number, "train/step_seconds": seconds, **fields}


def started(time: float, attempt: int) -> list[Line]:
    """An attempt whose workers start at `time` and whose loop starts 10 s later, with a first step of 1 s."""
    return [
        at(time + 3, Event.PHASE, name="imports and rendezvous", seconds=3.0),
        at(time + 3, Event.ATTEMPT_STARTED, attempt=attempt, world_size=4),
        at(time + 7, Event.PHASE, name="model", seconds=4.0),
        at(time + 10, Event.PHASE, name="load", seconds=3.0),
        at(time + 11, Event.PHASE, name="first_step", seconds=1.0),
    ]


def test_a_quiet_run_is_divided_into_its_parts() -> None:
    events = [
        at(0, Event.SUBMITTED),
        at(100, Event.JOB_RUN_STARTED),
        *started(105, 1),
        at(120, Event.CHECKPOINT_SAVED, step=5, stall_s=0.5),
        at(131, Event.FINISHED, attempt=1, cause="all steps are done"),
    ]
    steps = [
        *(step(115.0 + number, number, 1.0, **{"data/wait_seconds": 0.25}) for number in range(1, 11)),
        step(129.0, 11, 1.0, **{"val/seconds": 1.5}),
    ]
    found = goodput(events, steps, now=1e6, is_running=False)
    assert found is not None
    assert found.seconds == pytest.approx(
        {
            Category.QUEUE: 100.0,
            Category.START: 5.0 + 7.0,
            Category.LOAD: 3.0,
            Category.PRODUCTIVE: 10 * 0.75 + 1.0,
            Category.DATA: 2.5,
            Category.EVALUATION: 1.5,
            Category.SAVING: 0.5,
            Category.FINAL_SAVE: 2.0,
            Category.UNKNOWN: 16.0 - 8.5 - 2.5 - 1.5 - 0.5 - 2.0,
        }
    )
    assert found.wall_s == 131.0
    assert found.processor_hours == pytest.approx((4 * 8.5 / 3600, 4 * 26 / 3600))


def test_a_killed_attempt_lasts_until_its_last_step_and_the_rest_is_recovery() -> None:
    events = [
        at(0, Event.SUBMITTED),
        at(0, Event.JOB_RUN_STARTED),
        *started(0, 1),
        *started(50, 2),
        # Steps 11 to 20 of the first attempt were lost with it.
        at(60, Event.CONTINUED, step=10, lost_steps=10, lost_s=40.0, repeated_s=10.0),
        at(75, Event.FINISHED, attempt=2, cause="done"),
    ]
    events = sorted(events, key=lambda event: event["time"])
    steps = [step(10.0 + n, n) for n in range(1, 11)] + [step(50.0 + n, n) for n in range(11, 26)]
    found = goodput(events, steps, now=1e6, is_running=False)
    assert found is not None
    assert found.attempts[0].how == "killed"
    assert found.attempts[0].end == pytest.approx(30.0)
    assert found.seconds[Category.REPEATED] == pytest.approx(10.0)
    assert found.seconds[Category.RECOVERY] == pytest.approx(20.0)
    assert found.seconds[Category.PRODUCTIVE] == pytest.approx(25.0, abs=1.0)
    assert len(found.failures) == 1


def test_a_pause_of_a_person_is_not_held_against_the_run() -> None:
    events = [
        at(0, Event.SUBMITTED),
        at(0, Event.JOB_RUN_STARTED),
        *started(0, 1),
        at(21, Event.STOPPED, attempt=1, cause="stop file"),
        at(100_021, Event.SUBMITTED),
        at(100_021, Event.JOB_RUN_STARTED),
        *started(100_021, 2),
        at(100_042, Event.FINISHED, attempt=2, cause="done"),
    ]
    steps = [step(10.0 + n, n) for n in range(1, 11)] + [step(100_031.0 + n, n + 10) for n in range(1, 11)]
    found = goodput(events, steps, now=1e6, is_running=False)
    assert found is not None
    assert found.seconds[Category.DOWN] == 100_000.0
    assert found.share == pytest.approx(20 / 42, abs=0.03)


def test_a_hang_is_counted_until_it_is_found() -> None:
    events = [
        at(0, Event.SUBMITTED),
        at(0, Event.JOB_RUN_STARTED),
        *started(0, 1),
        at(611, Event.HANG, attempt=1, culprit="rank 1"),
        *started(620, 2),
    ]
    found = goodput(events, [step(11.0, 1)], now=640.0, is_running=True)
    assert found is not None
    assert found.seconds[Category.HANG] == pytest.approx(600.0)
    assert found.attempts[-1].how == "running"
    assert found.wall_s == 640.0


NAMES = st.sampled_from([event for event in Event if event is not Event.ATTEMPT_STARTED])


@st.composite
def histories(draw: st.DrawFn) -> list[Line]:
    time, attempt, lines = 0.0, 0, []
    for _ in range(draw(st.integers(1, 40))):
        time += draw(st.floats(-5.0, 100.0))  # a clock may be set back
        if draw(st.booleans()):
            attempt += 1
            lines += started(time, attempt)
        fields = {"seconds": draw(st.floats(0, 50)), "repeated_s": draw(st.floats(0, 500))}
        name = draw(NAMES)
        lines.append(
            at(time, name, step=draw(st.integers(0, 9)), name="load", stall_s=1.0, attempt=attempt, **fields)
        )
    return lines


@given(
    histories(),
    st.lists(st.tuples(st.floats(0, 4000), st.integers(1, 50), st.floats(0, 300)), max_size=30),
    st.booleans(),
)
def test_categories_are_disjoint_and_add_up_for_any_history(
    events: list[Line], steps: list[tuple[float, int, float]], is_running: bool
) -> None:
    found = goodput(events, [step(*values) for values in sorted(steps)], now=5000.0, is_running=is_running)
    assert found is not None
    assert min(found.seconds.values(), default=0.0) >= -1e-6
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, abs=1e-6)
    for attempt in found.attempts:
        assert sum(attempt.seconds.values()) == pytest.approx(attempt.end - attempt.start, abs=1e-6)
        assert attempt.end >= attempt.start


def test_a_run_without_events_has_no_goodput() -> None:
    assert goodput([], [], now=1.0, is_running=True) is None
