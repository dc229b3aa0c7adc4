"""How an attempt ends that is asked to stop."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import committed
from gpt.checkpoint.writer import remove_leftovers
from gpt.run import record
from gpt.run.attempts import Superseded
from gpt.run.exit_codes import ExitCode
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving import saver as saver_module
from gpt.training.attempt import AttemptOutcome
from gpt.training.trainer import Trainer
from tests.unit.gpt.saving.support import arm, join, make_saver


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """As much of a Trainer as a stop needs, with a real Saver."""
    run = RunDir(tmp_path / "run")
    run.attempt(1).path.mkdir(parents=True)
    world = join(tmp_path / "meeting", 0, 1)
    trainer = cast(Any, Trainer.__new__(Trainer))
    trainer.stop = StopFlag()
    trainer.stop.reason = "SIGTERM"
    saver, engine = make_saver(run, world, trainer.stop)
    engine.take_step()
    trainer.run, trainer.run_dir, trainer.world, trainer.saver = engine.run, run, world, saver
    trainer.lines = SimpleNamespace(write=lambda: None, problem=None)
    trainer.reader = SimpleNamespace(skipped=())
    yield trainer
    dist.destroy_process_group()


def test_a_stop_that_saves_ends_with_75(trainer: Trainer) -> None:
    cause = "stopped at step 7 (SIGTERM); everything is saved"
    assert trainer._end(7, is_stopping=True) == AttemptOutcome(ExitCode(75), cause, 7)


def test_a_stop_that_cannot_save_is_a_failure_after_which_the_run_may_go_on(trainer: Trainer) -> None:
    trainer.run_dir.checkpoints.write_text("a disk that does not take it")
    outcome = trainer._end(7, is_stopping=True)
    assert (outcome.exit_code, outcome.step) == (1, 7)
    assert outcome.cause.startswith(
        "stopped at step 7 (SIGTERM); not saved: rank 0 cannot write its checkpoint: "
    )


def test_a_stop_of_an_older_copy_is_none(trainer: Trainer) -> None:
    trainer.run_dir.attempt(2).path.mkdir()
    with pytest.raises(Superseded, match="Attempt 2 has taken the run over"):
        trainer._end(7, is_stopping=True)


@pytest.fixture
def hung(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A save of step 6 is under way, whose thread does not react."""
    monkeypatch.setattr(saver_module, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.3)
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
    assert hung._end(7, is_stopping=True).exit_code == 75
    assert time.monotonic() - started < 5
    assert [step for step, _ in committed(hung.run_dir.checkpoints)] == [7]
    remove_leftovers(hung.run_dir.checkpoints)
    assert [entry.name for entry in hung.run_dir.checkpoints.iterdir()] == ["step-00000007"]
    names = [str(line["event"]) for line in record.read(hung.run_dir.events)]
    assert names == ["checkpoint_given_up", "checkpoint_failed", "checkpoint_saved"]


def test_a_stop_on_a_disk_that_goes_on_hanging_ends_without_a_save(hung: Trainer) -> None:
    started = time.monotonic()
    outcome = hung._end(7, is_stopping=True)
    assert time.monotonic() - started < 5
    assert (outcome.exit_code, outcome.step) == (1, 7)
    assert outcome.cause.endswith("not saved: its writer made no progress for 0.3 s and is abandoned")
    assert committed(hung.run_dir.checkpoints) == []


@pytest.fixture
def asked_later(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """The stop is asked for in a second: the disk hangs by then."""
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.3)
    arm(monkeypatch, "chunk_written:sleep=1000")
    trainer.stop.reason = None
    timer = threading.Timer(1.0, setattr, (trainer.stop, "reason", "SIGTERM"))
    timer.start()
    yield trainer
    timer.cancel()


def test_a_stop_ends_a_save_that_training_waits_for_and_that_hangs(
    asked_later: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = asked_later.run_dir, time.monotonic()
    saver, engine = make_saver(run, asked_later.world, asked_later.stop, asynchronous=False)
    engine.take_step()
    saver.save(6, ())
    assert 1.0 <= time.monotonic() - started < 5
    (failed,) = record.read(run.events)
    assert (failed["event"], failed["step"]) == ("checkpoint_failed", 6)
    assert failed["reason"] == "its writer made no progress for 0.3 s and is abandoned"
    arm(monkeypatch, "")
    asked_later.saver = saver
    assert asked_later._end(7, is_stopping=True).exit_code == 75
    assert [step for step, _ in committed(run.checkpoints)] == [7]


def test_a_stop_ends_the_save_of_the_last_step_where_it_hangs(asked_later: Trainer) -> None:
    started, last = time.monotonic(), asked_later.run.total_steps
    outcome = asked_later._end(last, is_stopping=False)
    assert 1.0 <= time.monotonic() - started < 5
    assert (outcome.exit_code, outcome.step) == (1, last)
    assert outcome.cause == (
        f"stopped at step {last} (SIGTERM); not saved: its writer made no progress for 0.3 s and is abandoned"
    )


def test_without_a_stop_a_slow_disk_is_waited_for(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.2)
    arm(monkeypatch, "file_written:sleep=1")
    trainer.stop.reason, last = None, trainer.run.total_steps
    assert trainer._end(last, is_stopping=False) == AttemptOutcome(
        ExitCode(0), f"all {last} steps are done", last
    )
    assert [step for step, _ in committed(trainer.run_dir.checkpoints)] == [last]


def test_a_last_step_that_cannot_be_saved_ends_the_run_where_nobody_asked_for_it(trainer: Trainer) -> None:
    trainer.stop.reason = None
    trainer.run_dir.checkpoints.write_text("a disk that does not take it")
    with pytest.raises(CheckpointError, match="rank 0 cannot write its checkpoint"):
        trainer._end(trainer.run.total_steps, is_stopping=False)
