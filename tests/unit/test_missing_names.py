"""What another machine has just made is seen, though NFS may say from its cache that it is missing."""

from pathlib import Path

import pytest

from gpt.run.attempts import is_superseded
from gpt.run.json_file import is_listed
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run directory whose single names are looked up in a cache from before they were made."""
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    folders = {run.path, run.attempts}
    monkeypatch.setattr(Path, "exists", lambda path: path in folders)
    return run


def test_a_later_attempt_supersedes_this_one(run: RunDir) -> None:
    run.attempt(3).path.mkdir()
    assert not is_superseded(run, 3)
    run.attempt(5).path.mkdir()  # also where the number between them is not there
    assert is_superseded(run, 3)


def test_a_stop_request_is_seen(run: RunDir) -> None:
    stop = StopFlag()
    stop.watch(run.stop)
    assert not stop.is_requested()
    run.stop.write_text('{"reason": "a test"}')
    stop.watch(run.stop)
    stop._next_poll = 0.0
    assert stop.is_requested()
    assert stop.reason == "a test"


def test_nothing_is_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    assert not is_listed(tmp_path / "missing" / "name")
