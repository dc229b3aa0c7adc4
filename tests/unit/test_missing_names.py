"""Files that another machine has just made are found, although the NFS cache reports them as missing."""

import time
from pathlib import Path

import pytest

from gpt.run.attempts import is_superseded
from gpt.run.json_file import is_listed
from gpt.run.run_dir import RunDir
from gpt.run.stop import POLL_S, StopFlag


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run directory in which looking a name up uses a cache that is older than the file."""
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    folders = {run.path, run.attempts}
    monkeypatch.setattr(Path, "exists", lambda path: path in folders)
    return run


def test_later_attempt_supersedes_this_one(run: RunDir) -> None:
    run.attempt(3).path.mkdir()
    assert not is_superseded(run, 3)
    run.attempt(5).path.mkdir()  # even when the number in between is missing
    assert is_superseded(run, 3)


def test_stop_request_is_found(run: RunDir) -> None:
    stop = StopFlag()
    stop.watch(run.stop)
    assert not stop.is_requested()
    run.stop.write_text('{"reason": "a test"}')
    time.sleep(POLL_S)
    assert stop.is_requested()
    assert stop.reason == "a test"


def test_missing_folder_lists_nothing(tmp_path: Path) -> None:
    assert not is_listed(tmp_path / "missing" / "name")
