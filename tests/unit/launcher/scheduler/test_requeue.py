"""Requeueing a job while the controller refuses or is away: nodes must not stand idle forever."""

import time

import pytest

from data_pipeline.errors import LaunchError
from launcher.scheduler import slurm_commands
from tests.unit.launcher.fake_slurm import FakeJob, FakeSlurm


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    fake.jobs["7"] = FakeJob()
    fake.install(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    return fake


def requests(slurm: FakeSlurm) -> int:
    return sum(command[:2] == ["scontrol", "requeue"] for command in slurm.asked)


def test_refusal_that_lasts_a_minute_is_reported(slurm: FakeSlurm) -> None:
    slurm.requeue_errors = ["Requested operation is presently disabled"]
    with pytest.raises(LaunchError, match="Requested operation is presently disabled"):
        slurm_commands.requeue("7", 0)
    assert requests(slurm) == 12


def test_controller_that_is_away_is_asked_until_it_returns(slurm: FakeSlurm) -> None:
    slurm.requeue_errors = [*["Unable to contact slurm controller (connect failure)"] * 40, ""]
    assert slurm_commands.requeue("7", 0)
    assert requests(slurm) == 41


def test_job_run_that_is_over_is_not_requeued(slurm: FakeSlurm) -> None:
    slurm.jobs["7"].restarts = 1
    assert not slurm_commands.requeue("7", 0)
    assert requests(slurm) == 0
