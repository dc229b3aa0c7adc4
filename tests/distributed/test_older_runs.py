"""A data set and a run that an earlier version wrote still verify, resume and sample.

The fixture holds a data set with a tokenizer of 300 ids and a run of 4,216 parameters that trained four steps
at ZeRO stage 2 on two processes. The expected values are what that version computed when it resumed the run.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint.format import committed
from gpt.checkpoint.reader import CheckpointReader
from gpt.run import record
from gpt.run.run_dir import RunDir
from tests.paths import ROOT

ARCHIVE = ROOT / "tests/fixtures/older_run.tar.gz"

# SHA-256 of every state of every group, in the order of the index.
STATE_DIGESTS = {
    2: "362836137f99ebd66affb2e9785ec0241dacd6df28f5dc84dc3447e63c38a7d6",
    4: "4d8650cd72dd7c8f46b95733432da059205c16f8119c6f0b3ffdde982d94ba63",
}
# Losses differ between processors in their last digits; everything else is exact.
LOSSES = {
    5: {"train/loss": 5.678771018981934},
    6: {"train/loss": 5.673454972809436, "val/loss": 5.671839427947998},
}
LOSS_TOLERANCE = 1e-6
EXACT = {
    5: {
        "tokens": 1280,
        "train/lr": 0.0006954058453981609,
        "data/digest": 19847651873.0,
        "data/sequences_behind": 40,
    },
    6: {
        "tokens": 1536,
        "train/lr": 0.00030000000000000003,
        "data/digest": 16964967174.0,
        "data/sequences_behind": 48,
    },
}
# At temperature 0.
SAMPLE_OF_STEP_4 = "In the the the the the the\n"


@dataclass
class Older:
    """The unpacked fixture."""

    data: Path
    run: RunDir


@pytest.fixture
def older(tmp_path: Path) -> Older:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return Older(tmp_path / "data", RunDir(tmp_path / "run"))


def outlast(*arguments: str | Path) -> str:
    """Run a command as a user does; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", "from launcher.cli import main; main()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def state_digest(folder: Path) -> str:
    reader, digest = CheckpointReader(folder), hashlib.sha256()
    for group in reader.index.groups:
        for state in group.states:
            digest.update(reader.read(group.name, state, 0, group.numel).tobytes())
    return digest.hexdigest()


def test_older_data_set_verifies_and_can_be_inspected(older: Older) -> None:
    outlast("verify", older.data)
    assert "34,001" in outlast("data", "inspect", older.data)


def test_older_checkpoints_verify_and_hold_the_same_state(older: Older) -> None:
    outlast("verify", older.run.path)
    found = {step: state_digest(folder) for step, folder in committed(older.run.checkpoints)}
    assert found == STATE_DIGESTS


def test_older_run_resumes_to_the_end_with_the_same_numbers(older: Older) -> None:
    outlast("resume", older.run.path, "--set", f"data.path={older.data}", "--set", "schedule.total_steps=6")
    lines: dict[int, dict[str, Any]] = {line["step"]: line for line in record.read(older.run.metrics)}
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    for step, expected in EXACT.items():
        assert {name: lines[step][name] for name in expected} == expected
    for step, losses in LOSSES.items():
        found = {name: lines[step][name] for name in losses}
        assert found == pytest.approx(losses, abs=LOSS_TOLERANCE, rel=0)
    assert [step for step, _ in committed(older.run.checkpoints)] == [2, 4, 6]
    outlast("verify", older.run.path)


def test_older_run_generates_the_same_text(older: Older) -> None:
    # A run that is only read keeps the data path of the machine that trained it.
    config = older.run.config.read_text()
    older.run.config.write_text(config.replace('"/old/data"', f'"{older.data}"'))
    arguments = ("--prompt", "In the", "--temperature", "0", "--max-tokens", "5")
    assert outlast("sample", older.run.path, *arguments) == SAMPLE_OF_STEP_4
