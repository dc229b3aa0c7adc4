"""A run's checkpoints as a list; pins and deletions."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import PIN_NAME, committed, is_pinned
from gpt.checkpoint.removal import reject
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.commands.checkpoints import checkpoints
from tests.unit.gpt.checkpoint.support import write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Three checkpoints; 5 was planted from another run, 10 and 15 were saved."""
    run = RunDir(tmp_path)
    for step in (5, 10, 15):
        write_checkpoint(run.checkpoints, step=step)
        record.append(run.metrics, step=step, **({"val/loss": 2.5} if step == 10 else {}))
    for step in (10, 15):
        record_event(run.events, Event("checkpoint_saved"), step=step)
    return run


def call(run: RunDir, **options: object) -> int:
    steps = {"pin": (), "unpin": (), "delete": ()}
    flags = {"delete_set_aside": False, "check": False, "as_json": False}
    return checkpoints(run, **{**steps, **flags, **options})  # type: ignore[arg-type]


def test_the_list_says_size_origin_score_and_whether_it_was_read_back(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["verified"], row["val_loss"]) for row in rows] == [
        (5, "not yet", None), (10, "when saved", 2.5), (15, "when saved", None),
    ]  # fmt: skip
    assert {(row["world_size"], row["stage"]) for row in rows} == {(3, 1)}
    files = run.checkpoints / "step-00000005"
    assert rows[0]["size_bytes"] == sum(file.stat().st_size for file in files.iterdir())


def test_a_check_reads_every_byte_and_names_what_is_bad(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run, check=True) == 0
    path = run.checkpoints / "step-00000010" / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert call(run, check=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "bad: rank-00001.safetensors: the chunk checksums are not as written" in lines[2]
    assert lines[1].rstrip().endswith("now")


def test_a_pinned_checkpoint_is_not_deleted_until_it_is_unpinned(run: RunDir) -> None:
    call(run, pin=(5,))
    assert is_pinned(run.checkpoints / "step-00000005")
    with pytest.raises(LaunchError, match="step 5 is pinned; --unpin it first"):
        call(run, delete=(5,))
    call(run, unpin=(5,), delete=(5,))
    assert [step for step, _ in committed(run.checkpoints)] == [10, 15]
    assert [entry.name for entry in run.checkpoints.glob(".*")] == []


def test_two_whole_checkpoints_stay_always(run: RunDir) -> None:
    with pytest.raises(LaunchError, match="1 of the checkpoints that would stay are whole; at least 2 stay"):
        call(run, delete=(5, 10))
    assert len(committed(run.checkpoints)) == 3
    (run.checkpoints / "step-00000015" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(LaunchError, match="1 of the checkpoints that would stay are whole"):
        call(run, delete=(5,))
    call(run, delete=(15, 15))  # a bad one helps nobody
    assert [step for step, _ in committed(run.checkpoints)] == [5, 10]


@pytest.fixture
def aside(run: RunDir) -> list[Path]:
    """A bad one and one of a course that the run has left."""
    bad = reject(write_checkpoint(run.checkpoints, step=20))
    left = run.checkpoints / ".before-1-step-00000025"
    write_checkpoint(run.checkpoints, step=25).rename(left)
    return [bad, left]


def test_what_was_set_aside_is_told_and_goes_when_asked_to(
    run: RunDir, aside: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call(run)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in aside]
    expected = [f"{folder}, {count / 1024:.1f} KiB" for folder, count in zip(aside, sizes, strict=True)]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"set aside, until --delete-set-aside: {each}" for each in expected]
    call(run, delete_set_aside=True)
    assert capsys.readouterr().err.splitlines() == [f"deleted: {each}" for each in expected]
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == [
        "step-00000005", "step-00000010", "step-00000015",
    ]  # fmt: skip
    call(run, delete_set_aside=True)
    assert capsys.readouterr().err == f"nothing is set aside in {run.checkpoints}\n"


def test_a_pin_holds_what_was_set_aside_too(run: RunDir, aside: list[Path]) -> None:
    pin = aside[1] / PIN_NAME
    pin.touch()
    with pytest.raises(LaunchError, match=f"nothing is deleted: remove {re.escape(str(pin))} first"):
        call(run, delete_set_aside=True)
    assert all(folder.exists() for folder in aside)


def test_an_unknown_step_is_named_with_those_that_are_there(run: RunDir) -> None:
    with pytest.raises(LaunchError, match=r"no checkpoint of step 7; there are: 5, 10, 15\."):
        call(run, pin=(7,))
