"""The copy of the code in a run directory."""

import os
from pathlib import Path

from gpt.run.run_dir import RunDir
from launcher.runs.code_snapshot import snapshot_code


def test_what_a_killed_command_has_left_is_replaced(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for leftover in (run.code_being_copied, tmp_path / f".code.{os.getpid()}"):
        (leftover / "launcher").mkdir(parents=True)
    snapshot_code(run)
    (run.code / "old").touch()
    snapshot_code(run)
    assert [entry.name for entry in tmp_path.iterdir()] == ["code"]
    assert sorted(entry.name for entry in run.code.iterdir()) == ["data_pipeline", "gpt", "launcher"]
