"""How an attempt ends that is asked to stop."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from gpt import record
from gpt import trainer as trainer_module
from gpt.attempt import Superseded
from gpt.checkpoint import saver as saver_module
from gpt.checkpoint.format import committed
from gpt.checkpoint.writer import remove_leftovers
from gpt.run_dir import RunDir
from gpt.stop import StopRequest
from gpt.trainer import Outcome, Trainer
from tests.unit.saver_support import arm, join, make_saver


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """As much of a Trainer as a stop needs, with a real Saver."""
    run = RunDir(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    world = join(tmp_path / "meeting", 0, 1)
    saver, engine = make_saver(run, world)
    engine.take_step()
    trainer = cast(Any, Trainer.__new__(Trainer))
    trainer.run_dir, trainer.world, trainer.saver = run, world, saver
    trainer.stop = StopRequest()
    trainer.lines = SimpleNamespace(write=lambda: None, problem=None)
    trainer.reader = SimpleNamespace(skipped=())
    yield trainer
    dist.destroy_process_group()


def test_a_stop_that_saves_ends_with_75(trainer: Trainer) -> None:
    cause = "stopped at step 7 (a signal to another rank); everything is saved"
    assert trainer._stop(7) == Outcome(75, cause, 7)


def test_a_stop_that_cannot_save_is_a_failure_after_which_the_run_may_go_on(trainer: Trainer) -> None:
    trainer.run_dir.checkpoints.write_text("a disk that does not take it")
    outcome = trainer._stop(7)
    assert (outcome.exit_code, outcome.step) == (1, 7)
    assert outcome.cause.startswith(
        "stopped at step 7 (a signal to another rank); not saved: rank 0 cannot write its checkpoint: "
    )


def test_a_stop_of_an_older_copy_is_none(trainer: Trainer) -> None:
    trainer.run_dir.attempt(2).mkdir()
    with pytest.raises(Superseded, match="attempt 2 has started since"):
        trainer._stop(7)


@pytest.fixture
def hung(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A save of step 6 is under way, whose thread does not react."""
    monkeypatch.setattr(saver_module, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(trainer_module, "SILENCE_S", 0.3)
    arm(monkeypatch, "chunk_written:sleep=1000")
    trainer.saver.save(6, ())
    while not any(file.stat().st_size for file in trainer.run_dir.checkpoints.glob(".tmp-*/rank-*")):
        time.sleep(0.01)
    time.sleep(0.2)  # from the write to the failpoint
    return trainer


def test_a_stop_leaves_a_writer_that_hangs_behind_and_saves_anew(
    hung: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(monkeypatch, "")
    started = time.monotonic()
    assert hung._stop(7).exit_code == 75
    assert time.monotonic() - started < 5
    assert [step for step, _ in committed(hung.run_dir.checkpoints)] == [7]
    remove_leftovers(hung.run_dir.checkpoints)
    assert [entry.name for entry in hung.run_dir.checkpoints.iterdir()] == ["step-00000007"]
    names = [str(line["event"]) for line in record.read(hung.run_dir.events)]
    assert names == ["checkpoint_given_up", "checkpoint_failed", "checkpoint_saved"]


def test_a_stop_on_a_disk_that_goes_on_hanging_ends_without_a_save(hung: Trainer) -> None:
    started = time.monotonic()
    outcome = hung._stop(7)
    assert time.monotonic() - started < 5
    assert (outcome.exit_code, outcome.step) == (1, 7)
    assert outcome.cause.endswith("not saved: nothing more of it was written for 0.3 s")
    assert committed(hung.run_dir.checkpoints) == []
