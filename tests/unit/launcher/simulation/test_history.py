"""What earlier runs tell about a cluster."""

from pathlib import Path

import pytest

from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.simulation.history import History, history_of
from launcher.simulation.scenario import DAY_S


def test_history_counts_failures_and_takes_the_medians_of_starts_and_saves(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number, seconds in enumerate((3.0, 5.0, 70.0), start=1):
        record_event(run.events, Event.ATTEMPT_STARTED, attempt=number, world_size=4)
        record_event(run.events, Event.PHASE, name="load", seconds=seconds)
        record_event(
            run.events, Event.CHECKPOINT_SAVED, step=number, seconds=2 * seconds, stall_s=seconds / 10
        )
    record_event(run.events, Event.FINISHED, attempt=3, exit_code=0, cause="done", step=3)
    found = history_of([(run, 4)])
    assert (found.failures, found.start_s, found.stall_s, found.save_s) == (2, 5.0, 0.5, 10.0)
    assert 0 <= found.node_seconds < 40


def test_rate_without_observations_is_the_published_one() -> None:
    assert History().node_failure_rate * 1000 * DAY_S == pytest.approx(6.5)
    assert history_of([]) == History()


def test_many_observations_outweigh_the_prior() -> None:
    observed = History(failures=1000, node_seconds=1000 * DAY_S)
    assert observed.node_failure_rate * DAY_S == pytest.approx(1.0, rel=0.15)
