"""What an attempt decides before it touches anything, without a process group or a file."""

from typing import Any

import pytest

from gpt.config.run import RunConfig
from gpt.run.environment import WorkerEnvironment
from gpt.training.start_plan import BuildPlan, ResumePlan, is_evaluation_missing, lost_work


def config(**fields: Any) -> RunConfig:
    tables: dict[str, Any] = {
        "name": "plan",
        "data": {"path": "/data"},
        "schedule": {"total_steps": 100, "warmup_steps": 10},
    }
    return RunConfig.model_validate({**tables, **fields})


def test_new_run_draws_its_weights_and_a_resumed_one_does_not() -> None:
    assert BuildPlan.of(config(), has_checkpoint=False).draws_weights
    assert not BuildPlan.of(config(), has_checkpoint=True).draws_weights


def test_rehearsal_pauses_a_new_run_and_stops_it_once_it_has_resumed() -> None:
    asked = WorkerEnvironment(pause_at=3, stop_at=5)
    new = ResumePlan.of(config()).rehearsed(asked)
    resumed = ResumePlan.of(config(), step=2).rehearsed(asked)
    assert (new.pause_at, new.stop_at) == (3, None)
    assert (resumed.pause_at, resumed.stop_at) == (None, 5)
    assert ResumePlan.of(config(), step=2).rehearsed(WorkerEnvironment()) == ResumePlan.of(config(), step=2)


@pytest.mark.parametrize(
    ("fields", "has_gpu", "compiles"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"model": {"recompute": "selective"}}, True, False),
        ({"compile": True}, False, True),
        ({"compile": False}, True, False),
    ],
)
def test_networks_are_compiled_on_gpus_unless_the_config_decides(
    fields: dict[str, Any], has_gpu: bool, compiles: bool
) -> None:
    assert BuildPlan.of(config(**fields), has_checkpoint=False, has_gpu=has_gpu).compiles is compiles


def test_sources_keep_their_weights() -> None:
    mixture = [{"path": "/a", "weight": 3.0}, {"path": "/b", "weight": 1.0}]
    sources = BuildPlan.of(config(data={"mixture": mixture}), has_checkpoint=False).sources
    assert [(str(path), weight) for path, weight in sources] == [("/a", 3.0), ("/b", 1.0)]


def test_new_run_starts_at_step_one() -> None:
    plan = ResumePlan.of(config())
    assert (plan.start, plan.first, plan.last) == (0, 1, 100)


def test_resumed_run_skips_what_the_checkpoint_skipped_and_the_config_adds() -> None:
    data = {"path": "/data", "skip": [[700, 800]]}
    plan = ResumePlan.of(config(data=data), step=40, skipped=((5, 9),))
    assert (plan.start, plan.first) == (40, 41)
    ((before, since), (added, from_step)) = plan.skips
    assert (before, since) == (((5, 9),), 0)
    assert ([tuple(pair) for pair in added], from_step) == ([(700, 800)], 40)


@pytest.mark.parametrize(("warmup", "step", "searches"), [("auto", 0, True), ("auto", 8, False)])
def test_warmup_is_searched_once(warmup: str, step: int, searches: bool) -> None:
    schedule = {"total_steps": 100, "warmup_steps": 10, "warmup": warmup}
    assert ResumePlan.of(config(schedule=schedule), step=step).searches_warmup is searches
    assert not ResumePlan.of(config(), step=step).searches_warmup


def test_lost_work_is_counted_from_the_last_kept_line() -> None:
    reached, kept = {"step": 57, "time": 1000.0}, {"step": 50, "time": 930.0}
    lost = {"lost_steps": 7, "lost_s": 80.0, "repeated_s": 70.0}
    assert lost_work(50, reached, kept, now=1010.0) == lost
    assert lost_work(0, reached, None, now=1010.0) == {
        **lost,
        "lost_steps": 57,
        "lost_s": 10.0,
        "repeated_s": 0.0,
    }
    assert lost_work(0, None, None, now=1010.0) is None


def test_no_time_is_lost_by_a_clock_that_was_set_back() -> None:
    reached, kept = {"step": 57, "time": 4_000_000.0}, {"step": 50, "time": 4_000_070.0}
    assert lost_work(50, reached, kept, now=10.0) == {"lost_steps": 7, "lost_s": 0.0, "repeated_s": 0.0}
    kept["time"] = 5.0
    assert lost_work(50, reached, kept, now=10.0) == {"lost_steps": 7, "lost_s": 5.0, "repeated_s": 5.0}


def test_evaluation_that_a_stop_cut_short_is_repeated() -> None:
    assert is_evaluation_missing(20, 10, {"step": 20, "train/loss": 1.0})
    assert not is_evaluation_missing(20, 10, {"step": 20, "val/loss": 1.0})
    assert not is_evaluation_missing(20, 15, {"step": 20})  # none is due at this step
    assert not is_evaluation_missing(20, 10, {"step": 19})
    assert not is_evaluation_missing(0, 10, {})  # a new run
