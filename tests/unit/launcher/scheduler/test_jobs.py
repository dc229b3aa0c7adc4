"""Who may start a run, and when a local job has ended."""

from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from gpt.run.run_dir import RunDir
from launcher.scheduler.jobs import claim_start, state
from tests.unit.launcher.support import give_job


def test_a_run_is_started_by_one_command_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with claim_start(run), pytest.raises(LaunchError, match="is being started by another command"):
        claim_start(run)
    claim_start(run).close()


def test_a_job_whose_process_was_never_seen_has_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    job = give_job(run, alive=False)
    assert state(run, job.model_copy(update={"process": None, "pid": 2**22 - 1})) == "ended"
