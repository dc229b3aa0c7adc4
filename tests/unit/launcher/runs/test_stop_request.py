"""The stop file of a run."""

from pathlib import Path

import pytest

from gpt.run.run_dir import RunDir
from launcher.runs.stop_request import pending_stop


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reason": "x"}'])
def test_any_stop_file_is_a_request_to_save_and_stop(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    assert pending_stop(run) is None
    run.stop.write_text(content)
    request = pending_stop(run)
    assert request is not None
    assert not request.now
