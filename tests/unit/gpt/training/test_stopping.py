"""How an attempt that is asked to stop ends."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import committed
from gpt.checkpoint.writer import remove_leftovers
from gpt.run import record
from gpt.run.attempts import Superseded
from gpt.run.exit_codes import ExitCode
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving import saver as saver_module
from gpt.saving.saver import Saver
from gpt.training.attempt import Attempt, AttemptOutcome
from gpt.training.ending import ask_to_stop_for_good, save_and_end, wait_to_be_killed
from gpt.training.start_clock import StartClock
from launcher.runs.stop_request import is_persons, pending_stop
from tests.unit.gpt.saving.support import arm, join, make_saver


@dataclass(frozen=True)
class Ending:
    """An attempt with a real Saver, at the end of its last step."""

    attempt: Attempt
    saver: Saver

    def end(self, step: int, *, is_stopping: bool) -> AttemptOutcome:
        return save_and_end(self.attempt, self.saver, step, (), problem=None, is_stopping=is_stopping)

    @property
    def checkpoints(self) -> Path:
        return self.attempt.run_dir.checkpoints

    @property
    def last(self) -> int:
        return self.attempt.run.total_steps


@pytest.fixture
def ending(tmp_path: Path) -> Iterator[Ending]:
    """An attempt that was asked to stop by SIGTERM."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.attempt(1).path.mkdir(parents=True)
    world = join(tmp_path / "meeting", 0, 1)
    stop = StopFlag()
    stop.reason = "SIGTERM"
    saver, engine = make_saver(run_dir, world, stop)
    engine.take_step()
    clock = StartClock(run_dir, world, Heartbeat(), time.monotonic())
    yield Ending(Attempt(engine.run, run_dir, world, 1, clock, stop), saver)
    dist.destroy_process_group()


def test_stop_saves_and_exits_with_75(ending: Ending) -> None:
    cause = "stopped at step 7 (SIGTERM); everything is saved"
    assert ending.end(7, is_stopping=True) == AttemptOutcome(ExitCode.STOPPED, cause, 7)


def test_rehearsal_stops_like_a_person_and_ends_its_pause_at_a_stop(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.training.ending._PAUSE_S", 0.05)
    monkeypatch.setattr("gpt.training.ending._LONGEST_PAUSE_S", 0.2)
    run, stop = ending.attempt.run_dir, ending.attempt.stop
    stop.reason = None
    started = time.monotonic()
    wait_to_be_killed(ending.attempt, 7)
    assert time.monotonic() - started >= 0.2
    assert ask_to_stop_for_good(ending.attempt, "the rehearsal")
    assert is_persons(pending_stop(run))  # so that no scheduler requeues the job
    wait_to_be_killed(ending.attempt, 7)
    assert ending.end(7, is_stopping=True).cause == "stopped at step 7 (the rehearsal); everything is saved"


def test_stop_that_cannot_save_fails_and_leaves_the_run_resumable(ending: Ending) -> None:
    ending.checkpoints.write_text("a disk that does not take it")
    outcome = ending.end(7, is_stopping=True)
    assert (outcome.exit_code, outcome.step) == (ExitCode.FAILED, 7)
    assert outcome.cause.startswith(
        "stopped at step 7 (SIGTERM); not saved: rank 0 cannot write its checkpoint: "
    )


def test_superseded_attempt_stops_without_saving(ending: Ending) -> None:
    ending.attempt.run_dir.attempt(2).path.mkdir()
    with pytest.raises(Superseded, match="Attempt 2 has taken the run over"):
        ending.end(7, is_stopping=True)


@pytest.fixture
def hung(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> Ending:
    """The save of step 6 is in flight, and its thread hangs."""
    monkeypatch.setattr(saver_module, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.3)
    arm(monkeypatch, "chunk_written:sleep=1000")
    ending.saver.save(6, ())
    while not any(file.stat().st_size for file in ending.checkpoints.glob(".tmp-*/rank-*")):
        time.sleep(0.01)
    time.sleep(0.2)  # from the write to the failpoint
    return ending


def test_stop_abandons_a_hung_writer_and_saves_again(hung: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "")
    started = time.monotonic()
    assert hung.end(7, is_stopping=True).exit_code == ExitCode.STOPPED
    assert time.monotonic() - started < 5
    assert [step for step, _ in committed(hung.checkpoints)] == [7]
    remove_leftovers(hung.checkpoints)
    assert [entry.name for entry in hung.checkpoints.iterdir()] == ["step-00000007"]
    names = [str(line["event"]) for line in record.read(hung.attempt.run_dir.events)]
    assert names == ["checkpoint_given_up", "checkpoint_failed", "checkpoint_saved"]


def test_stop_ends_without_a_checkpoint_when_the_disk_keeps_hanging(hung: Ending) -> None:
    started = time.monotonic()
    outcome = hung.end(7, is_stopping=True)
    assert time.monotonic() - started < 5
    assert (outcome.exit_code, outcome.step) == (ExitCode.FAILED, 7)
    assert outcome.cause.endswith("not saved: its writer made no progress for 0.3 s and is abandoned")
    assert committed(hung.checkpoints) == []


@pytest.fixture
def asked_later(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ending]:
    """The stop request comes in a second, when the disk already hangs."""
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.3)
    arm(monkeypatch, "chunk_written:sleep=1000")
    ending.attempt.stop.reason = None
    timer = threading.Timer(1.0, setattr, (ending.attempt.stop, "reason", "SIGTERM"))
    timer.start()
    yield ending
    timer.cancel()


def test_stop_ends_a_hung_synchronous_save(asked_later: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, started = asked_later.attempt, time.monotonic()
    run = attempt.run_dir
    saver, engine = make_saver(run, attempt.world, attempt.stop, asynchronous=False)
    engine.take_step()
    saver.save(6, ())
    assert 1.0 <= time.monotonic() - started < 5
    (failed,) = record.read(run.events)
    assert (failed["event"], failed["step"]) == ("checkpoint_failed", 6)
    assert failed["reason"] == "its writer made no progress for 0.3 s and is abandoned"
    arm(monkeypatch, "")
    assert replace(asked_later, saver=saver).end(7, is_stopping=True).exit_code == ExitCode.STOPPED
    assert [step for step, _ in committed(run.checkpoints)] == [7]


def test_stop_ends_the_hung_save_of_the_last_step(asked_later: Ending) -> None:
    started, last = time.monotonic(), asked_later.last
    outcome = asked_later.end(last, is_stopping=False)
    assert 1.0 <= time.monotonic() - started < 5
    assert (outcome.exit_code, outcome.step) == (ExitCode.FAILED, last)
    assert outcome.cause == (
        f"stopped at step {last} (SIGTERM); not saved: its writer made no progress for 0.3 s and is abandoned"
    )


def test_slow_disk_is_waited_for_without_a_stop_request(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "SILENCE_S", 0.2)
    arm(monkeypatch, "file_written:sleep=1")
    ending.attempt.stop.reason, last = None, ending.last
    outcome = AttemptOutcome(ExitCode.FINISHED, f"all {last} steps are done", last)
    assert ending.end(last, is_stopping=False) == outcome
    assert [step for step, _ in committed(ending.checkpoints)] == [last]


def test_last_step_that_cannot_be_saved_ends_the_run(ending: Ending) -> None:
    ending.attempt.stop.reason = None
    ending.checkpoints.write_text("a disk that does not take it")
    with pytest.raises(CheckpointError, match="rank 0 cannot write its checkpoint"):
        ending.end(ending.last, is_stopping=False)
