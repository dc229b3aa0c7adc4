"""When to save and what to keep: closed forms, and the extremes."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config_file import validate
from gpt.checkpoint.doubt import Doubt, doubt_of
from gpt.checkpoint.retention import kept
from gpt.config.run import CheckpointConfig
from gpt.run.events import Event, record_event
from gpt.saving.save_interval import (
    SaveClock,
    best_interval_s,
    failures_so_far,
    start_times_s,
    time_between_failures_s,
)

DAY = 86_400.0


def expected_loss(interval_s: float, stall_s: float, mean_s: float) -> float:
    """Seconds lost for a second of work, by simulation of a run that fails at exponential times."""
    chance = random.Random(7)
    done = wall = 0.0
    until_failure = chance.expovariate(1 / mean_s)
    for _ in range(20_000):
        segment = interval_s + stall_s
        if until_failure > segment:
            until_failure -= segment
            done += interval_s
            wall += segment
        else:
            wall += until_failure
            until_failure = chance.expovariate(1 / mean_s)
    return wall / done - 1


def test_best_interval_loses_the_least_time_in_a_simulation() -> None:
    best = best_interval_s(20.0, 3600.0, 0.0)
    losses = [expected_loss(factor * best - 20.0, 20.0, 3600.0) for factor in (0.4, 1.0, 2.5)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize(("stall_s", "mean_s"), [(1.0, 1e6), (5.0, 1e5)])
def test_best_interval_for_rare_failures_is_youngs(stall_s: float, mean_s: float) -> None:
    assert best_interval_s(stall_s, mean_s, 60.0) == pytest.approx((2 * stall_s * mean_s) ** 0.5, rel=0.01)


def test_long_recovery_makes_the_interval_longer() -> None:
    """Saxena et al. (arXiv:2410.18124): Tc = Ts + sqrt(2 (Tf + Tr) Ts + Ts²)."""
    assert best_interval_s(8.0, 700.0, 300.0) == 8.0 + (2 * 1000.0 * 8.0 + 64.0) ** 0.5


def test_starts_are_measured_by_their_phases() -> None:
    events = [
        {"event": "attempt_started"},
        {"event": "phase", "seconds": 2.0},
        {"event": "phase", "seconds": 3.0},
        {"event": "attempt_started"},
        {"event": "attempt_started"},
        {"event": "phase", "seconds": 4.0},
    ]
    assert start_times_s(events) == [5.0, 4.0]


def test_observed_failures_move_the_prior() -> None:
    prior = time_between_failures_s(nodes=10, failures=0, seconds=0.0)
    assert prior == pytest.approx(1000 * DAY / 6.5 / 10)
    assert time_between_failures_s(10, 9, 0.0) == pytest.approx(prior / 10)
    assert time_between_failures_s(10, 0, 3 * prior) == pytest.approx(4 * prior)
    assert time_between_failures_s(10, 100, 100 * 60.0) < 3 * prior / 100


def test_failures_are_attempts_that_ended_without_being_stopped() -> None:
    names = [
        "attempt_started",
        "phase",
        "attempt_started",
        "stopped",
        "attempt_started",
        "failed",
        "attempt_started",
    ]
    events = [{"event": name, "time": 10.0 * number} for number, name in enumerate(names)]
    assert failures_so_far(events) == (2, 30.0)


def test_clock_follows_the_measured_cost_of_saves() -> None:
    config = CheckpointConfig(interval="auto", max_lost_minutes=1e6)
    clock = SaveClock(config, failure_interval_s=1e6, now=0.0)
    clock.saved(stall_s=0.02, seconds=3.0)
    assert clock.interval_s == pytest.approx(200, rel=0.01)
    clock.saved(stall_s=0.02, seconds=300.0)  # a slow disk: one save must end before the next
    assert clock.interval_s == 600.0
    assert not clock.is_due(599.0)
    assert clock.is_due(600.0)
    clock.begun(600.0)
    assert not clock.is_due(1199.0)


def test_interval_keeps_to_max_lost_minutes() -> None:
    clock = SaveClock(CheckpointConfig(interval="auto", max_lost_minutes=5), failure_interval_s=1e9, now=0.0)
    clock.saved(stall_s=10.0, seconds=100.0)
    assert clock.interval_s == 200.0


def test_minutes_and_steps_decide_alone_when_they_are_given() -> None:
    assert SaveClock(CheckpointConfig(every_minutes=2), 1e6, now=0.0).interval_s == 120.0
    assert CheckpointConfig(every_minutes=2).every_steps is None
    assert SaveClock(CheckpointConfig(every_steps=7), 1e6, now=0.0).interval_s is None
    assert CheckpointConfig().every_steps == 500
    both = CheckpointConfig(every_steps=7, every_minutes=1)
    assert validate(CheckpointConfig, both.model_dump(), "test") == both


@given(steps=st.sets(st.integers(1, 500), min_size=2), data=st.data())
def test_retention_never_leaves_fewer_than_two_and_keeps_what_it_promises(
    steps: set[int], data: st.DataObject
) -> None:
    config = CheckpointConfig(
        keep_last=data.draw(st.integers(2, 5)),
        keep_every=data.draw(st.none() | st.integers(1, 100)),
        keep_best=data.draw(st.integers(0, 2)),
    )
    pinned = data.draw(st.sets(st.sampled_from(sorted(steps))))
    losses = {
        step: data.draw(st.floats(0, 10)) for step in data.draw(st.sets(st.sampled_from(sorted(steps))))
    }
    stay = kept(sorted(steps), config, pinned, losses)
    assert len(stay) >= 2
    assert pinned <= stay <= steps
    assert set(sorted(steps)[-config.keep_last :]) <= stay
    if config.keep_best and losses:
        assert min(losses.values()) in [losses.get(step) for step in stay]
    if config.keep_every is None and not config.keep_best:
        assert len(stay) <= config.keep_last + len(pinned)
    assert kept(sorted(stay), config, pinned, losses) == stay  # what stays, stays


def test_keep_every_keeps_one_checkpoint_per_interval() -> None:
    config = CheckpointConfig(keep_last=2, keep_every=100)
    there: set[int] = set()
    for step in range(30, 1000, 30):
        there = kept([*there, step], config)
    assert sorted(there) == [120, 210, 300, 420, 510, 600, 720, 810, 900, 960, 990]


def test_retention_keeps_the_last_checkpoint_from_before_a_row_of_left_out_updates() -> None:
    config = CheckpointConfig(keep_last=2)
    doubt = Doubt(left_out=frozenset({3, *range(61, 131)}))
    there: set[int] = set()
    for step in range(10, 140, 10):
        there = kept([*there, step], config, doubt=doubt)
        assert (60 in there) == (60 <= step <= 130)
    assert there == {60, 120, 130}
    assert kept([*there, 140], config, doubt=doubt) == {130, 140}  # an update was made: the row is broken


def test_retention_keeps_the_newest_checkpoint_with_finite_weights() -> None:
    config = CheckpointConfig(keep_last=2)
    assert kept([10, 20, 30, 40], config, doubt=Doubt(not_finite=frozenset({20, 30, 40}))) == {10, 30, 40}
    assert kept([30, 40], config, doubt=Doubt(not_finite=frozenset({30, 40}))) == {30, 40}


def test_steps_that_are_taken_again_are_in_doubt_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (5, 61, 62):
        record_event(path, Event.UPDATE_SKIPPED, step=step, reason="non-finite gradient")
    record_event(path, Event.CHECKPOINT_SAVED, step=62)
    record_event(path, Event.CHECKPOINT_NOT_FINITE, step=62, reason="NaN")
    assert doubt_of(path) == Doubt(frozenset({62}), frozenset({5, 61, 62}))
    record_event(path, Event.RESUMED, step=50)
    record_event(path, Event.CHECKPOINT_SAVED, step=62)
    assert doubt_of(path) == Doubt(frozenset(), frozenset({5}))
