"""Listing, pinning, deleting and verifying the checkpoints of a run."""

import json
import re
import tempfile
from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import PIN_NAME, committed, is_pinned
from gpt.checkpoint.removal import reject
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import REWOUND_PREFIX, RunDir
from launcher.commands.checkpoints import checkpoints
from launcher.commands.data import verify
from tests.unit.gpt.checkpoint.support import write_checkpoint
from tests.unit.launcher.commands.support import without_privileges


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with three checkpoints: 5 came from another run, 10 and 15 were saved."""
    run = RunDir(tmp_path)
    for step in (5, 10, 15):
        write_checkpoint(run.checkpoints, step=step)
        record.append(run.metrics, step=step, **({"val/loss": 2.5} if step == 10 else {}))
    for step in (10, 15):
        record_event(run.events, Event.CHECKPOINT_SAVED, step=step)
    return run


def call(run: RunDir, **options: object) -> int:
    steps = {"pin": (), "unpin": (), "delete": ()}
    flags = {"delete_set_aside": False, "check": False, "as_json": False}
    return checkpoints(run, **{**steps, **flags, **options})  # type: ignore[arg-type]


def test_the_list_shows_size_origin_score_and_verification(
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


def test_the_table_aligns_its_columns(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-00000010" / "checkpoint.json").write_text("{}")
    call(run, pin=(5,))
    heading, five, ten, _ = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "step"
    assert five[heading.index("pinned") :] == "pinned  not yet"
    assert ten[heading.index("val loss") :].split() == [
        "2.5000", "bad:", "checkpoint.json:", "not", "a", "readable", "index:", "'checksum'",
    ]  # fmt: skip


def test_a_checkpoint_that_cannot_be_read_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.path.chmod(0o755)  # pytest's own folders are private
        for step in (5, 10):
            write_checkpoint(run.checkpoints, step=step)
        (run.checkpoints / "step-00000005").chmod(0)
        with without_privileges():
            assert call(run) == 1
        lines = capsys.readouterr().out.splitlines()
        assert "bad: " in lines[1]
        assert "cannot be read: Permission denied" in lines[1]
        assert lines[2].endswith("not yet")


def test_a_check_verifies_every_byte_and_names_the_corrupt_file(
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
    with pytest.raises(LaunchError, match=r"step 5 is pinned\. Use --unpin first"):
        call(run, delete=(5,))
    call(run, unpin=(5,), delete=(5,))
    assert [step for step, _ in committed(run.checkpoints)] == [10, 15]
    assert [entry.name for entry in run.checkpoints.glob(".*")] == []


def test_two_intact_checkpoints_always_remain(run: RunDir) -> None:
    with pytest.raises(LaunchError, match="only 1 intact checkpoints would remain; at least 2 must"):
        call(run, delete=(5, 10))
    assert len(committed(run.checkpoints)) == 3
    (run.checkpoints / "step-00000015" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(LaunchError, match="only 1 intact checkpoints would remain"):
        call(run, delete=(5,))
    call(run, delete=(15, 15))  # a corrupt one can always go
    assert [step for step, _ in committed(run.checkpoints)] == [5, 10]


@pytest.fixture
def aside(run: RunDir) -> list[Path]:
    """A corrupt checkpoint, and one after a step that a resume went back to."""
    bad = reject(write_checkpoint(run.checkpoints, step=20))
    left = run.checkpoints / f"{REWOUND_PREFIX}1-step-00000025"
    write_checkpoint(run.checkpoints, step=25).rename(left)
    return [bad, left]


def test_checkpoints_set_aside_are_listed_and_deleted_on_request(
    run: RunDir, aside: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call(run)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in aside]
    sizes_of = [(folder, f"{count / 1024:.1f} KiB") for folder, count in zip(aside, sizes, strict=True)]
    assert capsys.readouterr().err.splitlines() == [
        f"set aside ({text}): {folder}; --delete-set-aside deletes it" for folder, text in sizes_of
    ]
    call(run, delete_set_aside=True)
    assert capsys.readouterr().err.splitlines() == [f"deleted: {folder}, {text}" for folder, text in sizes_of]
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == [
        "step-00000005", "step-00000010", "step-00000015",
    ]  # fmt: skip
    call(run, delete_set_aside=True)
    assert capsys.readouterr().err == f"no checkpoints are set aside in {run.checkpoints}\n"


def test_a_pinned_checkpoint_that_was_set_aside_is_not_deleted(run: RunDir, aside: list[Path]) -> None:
    pin = aside[1] / PIN_NAME
    pin.touch()
    with pytest.raises(LaunchError, match=f"nothing was deleted: .* Remove {re.escape(str(pin))} first"):
        call(run, delete_set_aside=True)
    assert all(folder.exists() for folder in aside)


def test_an_unknown_step_is_an_error_that_lists_the_available_steps(run: RunDir) -> None:
    with pytest.raises(LaunchError, match=r"no checkpoint of step 7\. Available steps: 5, 10, 15\."):
        call(run, pin=(7,))


def test_verify_names_every_corrupt_file_also_beside_an_unreadable_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.path.chmod(0o755)  # pytest's own folders are private
        run.config.write_text("{}")
        for step in (5, 10):
            write_checkpoint(run.checkpoints, step=step)
        rank_file = run.checkpoints / "step-00000010" / "rank-00001.safetensors"
        rank_file.write_bytes(b"x")
        (run.checkpoints / "step-00000005").chmod(0)
        with without_privileges():
            assert verify(run.path) == 1
        said = capsys.readouterr()
        first, second = said.out.splitlines()
        assert first.startswith(f"{run.checkpoints}/step-00000005/checkpoint.json: byte 0: ")
        assert "Permission denied" in first
        assert second.startswith(f"{rank_file}: byte 1: has 1 bytes instead of ")
        assert said.err == "2 checkpoints: 2 corrupt files\n"
