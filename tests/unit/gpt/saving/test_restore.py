"""The checkpoint that a run continues from when some are corrupt, here or at the mirror."""

import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest

from data_pipeline.errors import CheckpointError, ConfigError
from gpt.checkpoint import format, patience, reader
from gpt.checkpoint.format import committed, rank_name, verify
from gpt.checkpoint.mirror import Mirror
from gpt.config.resume_rules import config_fingerprint
from gpt.distributed.world import World
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from gpt.saving.restore import has_begun, load_newest
from gpt.sidecars.checkpoint_mirror import Copier
from tests.unit.gpt.saving.support import SmallEngine, alone, make_saver

__all__ = ["alone"]  # a fixture


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run, with a folder for its mirror next to it."""
    (tmp_path / "mirrors").mkdir()
    run = RunDir(tmp_path / "run")
    run.attempt(1).path.mkdir(parents=True)
    return run


def save(run: RunDir, world: World, *steps: int, **checkpoint: Any) -> None:
    saver, engine = make_saver(run, world, **checkpoint)
    for step in range(1, steps[-1] + 1):
        engine.take_step()
        if step in steps:
            saver.save_and_wait(step, ())


def load(run: RunDir, world: World, seed: int = 1234, **checkpoint: Any) -> tuple[int | None, SmallEngine]:
    """The step that is loaded, and the engine that it filled."""
    engine = SmallEngine(world.rank, world.size, **checkpoint)
    engine.run = engine.run.model_copy(update={"seed": seed})
    index = load_newest(run, cast(Any, engine), world, "d", is_begun=has_begun(run))
    return (index.step if index is not None else None), engine


def flip(folder: Path) -> None:
    """Flip a bit in the middle of rank 0's file."""
    path = folder / rank_name(0)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def copy_all(run: RunDir, place: Path) -> Mirror:
    copier = Copier(run, SmallEngine(0, 1, mirror=str(place)).run.checkpoint)
    while copier.copy_next():
        pass
    return copier.mirror


def test_corrupt_checkpoint_is_fetched_from_the_mirror_before_an_older_one_is_tried(
    run: RunDir, alone: World, tmp_path: Path
) -> None:
    save(run, alone, 1, 2)
    copy_all(run, tmp_path / "mirrors")
    flip(dict(committed(run.checkpoints))[2])
    step, engine = load(run, alone, mirror=str(tmp_path / "mirrors"))
    assert step == 2
    assert engine.holds(2)
    names = [line["event"] for line in record.read(run.events)]
    assert names[-3:] == ["checkpoint_rejected", "taken_from_mirror", "resumed"]
    assert len(list(run.checkpoints.glob(".bad-step-00000002-*"))) == 1


def test_mirror_is_rewound_to_the_step_that_the_run_continues_from(
    run: RunDir, alone: World, tmp_path: Path
) -> None:
    save(run, alone, 1, 2)
    mirror = copy_all(run, tmp_path / "mirrors")
    flip(dict(committed(run.checkpoints))[2])
    flip(tmp_path / "mirrors" / "run" / "checkpoints" / "step-00000002")
    assert load(run, alone, mirror=str(tmp_path / "mirrors"))[0] == 1
    assert mirror.steps() == [1]


def test_rewound_run_mirrors_its_new_checkpoints(run: RunDir, alone: World, tmp_path: Path) -> None:
    save(run, alone, 1, 5, 6)  # two are kept
    mirror = copy_all(run, tmp_path / "mirrors")
    for _, folder in committed(run.checkpoints):
        folder.rename(folder.with_name(f".bad-{folder.name}"))
    save(run, alone, 2)
    assert copy_all(run, tmp_path / "mirrors").steps() == [2]
    assert mirror.steps() == [2]


def test_edited_config_is_refused(run: RunDir, alone: World) -> None:
    save(run, alone, 1)
    with pytest.raises(ConfigError, match=r"saved under another config \(\w+\) .* config\.json was edited"):
        load(run, alone, seed=7)
    came_from = config_fingerprint(SmallEngine(0, 1).run)
    record_event(
        run.events, Event("config_changed"), changes={"seed": [1234, 7]}, config_fingerprint=came_from
    )
    assert load(run, alone, seed=7)[0] == 1


@pytest.mark.parametrize("event", ["imported", "branched", "checkpoint_saved"])
def test_run_that_lost_its_first_checkpoint_does_not_start_from_new_weights(
    run: RunDir, alone: World, event: str
) -> None:
    assert load(run, alone)[0] is None
    record_event(run.events, Event(event), step=0)
    with pytest.raises(CheckpointError, match="has had checkpoints and none is intact"):
        load(run, alone)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_error_of_the_file_system_is_retried_and_sets_no_checkpoint_aside(
    run: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save(run, alone, 1, 2)
    failures = [OSError(number, os.strerror(number))] * 3
    read = reader.read_chunk

    def read_or_fail(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        read(*arguments)

    monkeypatch.setattr(reader, "read_chunk", read_or_fail)
    step, engine = load(run, alone)
    assert (step, engine.holds(2), failures) == (2, True, [])
    failures += [OSError(number, os.strerror(number))] * 99
    monkeypatch.setattr(patience, "RETRY_FOR_S", 0.3)
    with pytest.raises(OSError, match=rf"{rank_name(0)} cannot be read: {os.strerror(number)}"):
        load(run, alone)
    assert [step for step, _ in committed(run.checkpoints)] == [1, 2]
    assert list(run.checkpoints.glob(".bad-*")) == []


def test_verify_reports_what_cannot_be_read(
    run: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, alone, 1)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(format, "read_chunk", fail)
    bad = list(verify(dict(committed(run.checkpoints))[1]))
    assert {place.reason for place in bad} == {"Input/output error"}
