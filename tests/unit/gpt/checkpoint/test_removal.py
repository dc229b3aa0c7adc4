"""Checkpoints that stop counting: rejected, rewound and deleted."""

from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import committed, rank_name, verify
from gpt.checkpoint.removal import delete, reject, rejected_or_rewound
from gpt.checkpoint.rewind import rewind
from gpt.run.run_dir import RunDir
from tests.unit.gpt.checkpoint.support import write_checkpoint


def saved(tmp_path: Path, *steps: int) -> RunDir:
    run = RunDir(tmp_path / "run")
    for step in steps:
        write_checkpoint(run.checkpoints, step=step, world_size=1)
    return run


def steps_of(run: RunDir) -> list[int]:
    return [step for step, _ in committed(run.checkpoints)]


def test_rewind_keeps_later_checkpoints_under_names_that_do_not_count(tmp_path: Path) -> None:
    run, lines = saved(tmp_path, 5, 10, 15), []
    later = rewind(run, 5, None, lines.append)
    assert [step for step, _ in later] == [10, 15]
    assert steps_of(run) == [5]
    assert [path for _, path in later] == rejected_or_rewound(run.checkpoints)
    assert all(list(verify(path)) == [] for _, path in later)
    assert lines == ["verifying every byte of the checkpoint of step 5"]


def test_rewind_to_a_missing_or_corrupt_checkpoint_changes_nothing(tmp_path: Path) -> None:
    run = saved(tmp_path, 5, 10)
    with pytest.raises(LaunchError, match=r"there is no checkpoint of step 7\. Available steps: 5, 10"):
        rewind(run, 7, None)
    (run.checkpoints / "step-00000005" / rank_name(0)).write_bytes(b"")
    with pytest.raises(LaunchError, match=r"step 5 is corrupt: .*: byte 0: .* Other checkpoints: 10"):
        rewind(run, 5, None)
    assert steps_of(run) == [5, 10]


def test_rejected_checkpoint_is_listed_until_it_is_deleted(tmp_path: Path) -> None:
    run = saved(tmp_path, 5, 10)
    rejected = reject(dict(committed(run.checkpoints))[10])
    assert steps_of(run) == [5]
    assert rejected_or_rewound(run.checkpoints) == [rejected]
    delete(rejected)
    assert rejected_or_rewound(run.checkpoints) == []
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000005"]
