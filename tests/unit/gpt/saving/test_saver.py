"""Saving in the background: training does not wait, and nothing incomplete counts as a checkpoint."""

import errno
import os
import pickle
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt.checkpoint import removal, writer
from gpt.checkpoint.failpoints import PLACES
from gpt.checkpoint.format import committed, verify
from gpt.checkpoint.reader import CheckpointReader
from gpt.checkpoint.writer import remove_leftovers
from gpt.distributed.world import World, agree, total
from gpt.run import attempts, record
from gpt.run.attempts import AttemptRemoved, Superseded, must_end, refuse_if_superseded
from gpt.run.host_memory import available_bytes
from gpt.run.run_dir import RunDir
from gpt.saving import rank_writer
from gpt.saving.saver import Saver
from tests.unit.gpt.saving.support import (
    STATES,
    alone,
    arm,
    expected_state,
    make_saver,
    save_in_two_processes,
)

__all__ = ["alone"]  # a fixture


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.attempt(1).path.mkdir(parents=True)
    return run


def boundary(saver: Saver, world: World) -> None:
    """Do what a step boundary does for a save in flight."""
    saver.advance(*total(world, *saver.report()))


def drain(saver: Saver, world: World) -> None:
    deadline = time.monotonic() + 30
    while saver.in_flight is not None:
        assert time.monotonic() < deadline
        boundary(saver, world)
        time.sleep(0.005)


def events(run: RunDir, name: str) -> list[dict[str, object]]:
    return [line for line in record.read(run.events) if line["event"] == name]


def holds(run: RunDir, step: int) -> bool:
    """Whether the checkpoint of `step` verifies and holds that step's state."""
    folder = dict(committed(run.checkpoints))[step]
    reader = CheckpointReader(folder)
    size = reader.index.groups[0].numel
    return list(verify(folder)) == [] and all(
        np.array_equal(reader.read("decay", state, 0, size), expected_state(step, state)) for state in STATES
    )


def test_saved_state_is_that_of_the_boundary_while_training_continues(run_dir: RunDir, alone: World) -> None:
    saver, engine = make_saver(run_dir, alone, max_mb_per_s=20)
    engine.take_step()
    saver.save(1, ())
    for _ in range(3):
        engine.take_step()
        boundary(saver, alone)
    assert saver.in_flight is not None
    drain(saver, alone)
    assert holds(run_dir, 1)
    (saved,) = events(run_dir, "checkpoint_saved")
    assert saved["stall_s"] < saved["seconds"]  # type: ignore[operator]


def test_asynchronous_save_writes_the_same_bytes_as_a_synchronous_one(tmp_path: Path, alone: World) -> None:
    files = []
    for is_asynchronous in (True, False):
        run = RunDir(tmp_path / str(is_asynchronous))
        run.attempt(1).path.mkdir(parents=True)
        saver, engine = make_saver(run, alone, asynchronous=is_asynchronous)
        engine.take_step()
        saver.save(1, ())
        assert (saver.in_flight is not None) == is_asynchronous
        saver.wait()
        folder = dict(committed(run.checkpoints))[1]
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_weights_that_are_not_finite_are_recorded_and_the_last_finite_checkpoint_stays(
    run_dir: RunDir, alone: World, is_asynchronous: bool
) -> None:
    saver, engine = make_saver(run_dir, alone, asynchronous=is_asynchronous)
    for step in range(1, 6):
        engine.take_step()
        state = {part.state: part.tensor for part in engine.state()}
        state["exp_avg"][7] = float("nan")  # only the weights are checked
        if step > 1:
            state["master"][-1] = float("inf")
        saver.save_and_wait(step, ())
    assert [step for step, _ in committed(run_dir.checkpoints)] == [1, 4, 5]
    found = events(run_dir, "checkpoint_not_finite")
    assert [(event["step"], event["ranks"]) for event in found] == [(step, [0]) for step in range(2, 6)]


def test_numbers_whose_sum_overflows_are_finite() -> None:
    numbers = np.full(1000, 3e38, np.float32)
    assert rank_writer.is_finite(numbers)
    for bad in (np.nan, np.inf, -np.inf):
        numbers[500] = bad
        assert not rank_writer.is_finite(numbers)


@pytest.mark.parametrize(("free_mb", "is_short"), [(17, True), (19, False)])
def test_save_is_synchronous_and_recorded_when_host_memory_is_short(
    run_dir: RunDir,
    alone: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_mb: int,
    is_short: bool,
) -> None:
    """The copy takes 14.4 MB, and saves may use four fifths of the available memory."""
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free_mb * 1000} kB\n")
    monkeypatch.setattr(rank_writer, "available_bytes", partial(available_bytes, proc=proc))
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    saver.save(1, ())
    assert (saver.in_flight is not None) != is_short
    saver.wait()
    assert holds(run_dir, 1)
    reasons = [event["reason"] for event in events(run_dir, "saving_synchronously")]
    assert reasons == is_short * [
        "1 of 1 ranks are on nodes without the memory for a copy of the state; on this node it needs 13 "
        "MiB, and 16 MiB are available"
    ]


def test_save_that_is_due_during_another_is_skipped_and_counted(run_dir: RunDir, alone: World) -> None:
    saver, engine = make_saver(run_dir, alone, max_mb_per_s=30)
    for step in (1, 2, 3):
        engine.take_step()
        saver.save(step, ())
    drain(saver, alone)
    assert [step for step, _ in committed(run_dir.checkpoints)] == [1]
    skipped = events(run_dir, "checkpoint_skipped")
    assert [(event["step"], event["skipped"]) for event in skipped] == [(2, 1), (3, 2)]
    assert "the save of step 1" in str(skipped[0]["reason"])


def test_speed_limit_holds_during_training_and_is_lifted_for_a_wait(run_dir: RunDir, alone: World) -> None:
    size_mb = 14.4
    saver, engine = make_saver(run_dir, alone, max_mb_per_s=30)
    engine.take_step()
    started = time.monotonic()
    saver.save(1, ())
    drain(saver, alone)
    assert time.monotonic() - started >= 2 * size_mb / 30  # written and read back
    slow, engine = make_saver(run_dir, alone, max_mb_per_s=1)
    engine.take_step()
    slow.save(2, ())
    slow.wait()
    assert holds(run_dir, 1)
    assert events(run_dir, "checkpoint_saved")[-1]["seconds"] < 20  # type: ignore[operator]


def test_given_up_save_leaves_nothing(run_dir: RunDir, alone: World) -> None:
    saver, engine = make_saver(run_dir, alone, max_mb_per_s=5)
    engine.take_step()
    saver.save(1, ())
    time.sleep(0.2)
    saver.give_up()
    engine.take_step()
    saver.save_and_wait(2, ())
    assert [entry.name for entry in run_dir.checkpoints.iterdir()] == ["step-00000002"]
    assert holds(run_dir, 2)
    assert [event["step"] for event in events(run_dir, "checkpoint_given_up")] == [1]


@pytest.mark.parametrize(
    ("place", "code"),
    [(place, "ENOSPC") for place in PLACES[1 : PLACES.index("renamed")]]
    + [("chunk_written", "EDQUOT"), ("folder_made", "EROFS")],
)
def test_failing_disk_fails_only_the_save(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch, place: str, code: str
) -> None:
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    saver.save_and_wait(1, ())
    with monkeypatch.context() as patch:
        arm(patch, f"{place}:error={code}")
        saver.save(2, ())
        drain(saver, alone)
    assert [entry.name for entry in run_dir.checkpoints.iterdir()] == ["step-00000001"]
    (failed,) = events(run_dir, "checkpoint_failed")
    assert os.strerror(getattr(errno, code)) in str(failed["reason"])
    saver.save_and_wait(3, ())
    assert [step for step, _ in committed(run_dir.checkpoints)] == [1, 3]


def test_failed_last_save_raises(run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    arm(monkeypatch, "file_written:error=ENOSPC")
    with pytest.raises(Exception, match=r"rank 0 cannot write its checkpoint: .*No space left"):
        saver.save_and_wait(1, ())


def test_hanging_writer_delays_no_step(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    arm(monkeypatch, "file_written:sleep=1")
    started = time.monotonic()
    saver.save(1, ())
    for step in range(2, 30):
        boundary(saver, alone)
        saver.save(step, ())
    assert time.monotonic() - started < 0.7
    assert len(events(run_dir, "checkpoint_skipped")) == 28
    drain(saver, alone)
    assert holds(run_dir, 1)


def test_superseded_attempt_commits_nothing(run_dir: RunDir, alone: World) -> None:
    saver, engine = make_saver(run_dir, alone, max_mb_per_s=50)
    engine.take_step()
    saver.save(1, ())
    run_dir.attempt(2).path.mkdir()
    with pytest.raises(Superseded, match="Attempt 2 has taken the run over"):
        drain(saver, alone)
    assert committed(run_dir.checkpoints) == []


def test_save_does_not_make_a_run_directory_anew(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_HIDDEN_S", 0.1)
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    run_dir.path.rename(run_dir.path.with_name("elsewhere"))
    saver.save(1, ())
    drain(saver, alone)
    assert not run_dir.path.exists()
    assert must_end(run_dir, 1)
    with pytest.raises(
        AttemptRemoved, match=r"attempts/0001 is gone: the run directory was moved"
    ) as removed:
        agree(alone, lambda: refuse_if_superseded(run_dir, 1))
    assert str(pickle.loads(pickle.dumps(removed.value))) == str(removed.value)


def test_attempt_that_is_hidden_for_a_moment_goes_on(run_dir: RunDir) -> None:
    hidden = run_dir.attempts.rename(run_dir.path / "hidden")
    threading.Timer(0.2, lambda: hidden.rename(run_dir.attempts)).start()
    assert must_end(run_dir, 1)
    refuse_if_superseded(run_dir, 1)
    assert not must_end(run_dir, 1)


@pytest.mark.parametrize("place", ["committed", "pruned"])
def test_superseded_attempt_deletes_nothing(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    earlier, engine = make_saver(run_dir, alone, keep_last=4)
    for step in (1, 2, 3):
        engine.take_step()
        earlier.save_and_wait(step, ())
    saver, engine = make_saver(run_dir, alone)  # it keeps two, so 1 and 2 are deleted
    engine.take_step()
    is_there, may_go_on = threading.Event(), threading.Event()

    def pause(at: str) -> None:
        if at == place:
            is_there.set()
            may_go_on.wait(20)

    monkeypatch.setattr(writer, "reach", pause)
    monkeypatch.setattr(removal, "reach", pause)
    saver.save(4, ())
    while not is_there.is_set():
        boundary(saver, alone)
    run_dir.attempt(2).path.mkdir()  # a newer attempt with a larger keep_last starts
    may_go_on.set()
    with pytest.raises(Superseded, match="Attempt 2 has taken the run over"):
        drain(saver, alone)
    steps = [step for step, _ in committed(run_dir.checkpoints)]
    assert steps == ([1, 2, 3, 4] if place == "committed" else [2, 3, 4])


def test_folder_that_a_newer_attempt_cleared_is_not_committed(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, engine = make_saver(run_dir, alone)
    engine.take_step()
    arm(monkeypatch, "index_written:sleep=1")  # after the check for a newer attempt, before the rename
    saver.save(1, ())
    deadline = time.monotonic() + 10
    while not list(run_dir.checkpoints.glob(".tmp-*/checkpoint.json")) and time.monotonic() < deadline:
        boundary(saver, alone)
    remove_leftovers(run_dir.checkpoints)
    drain(saver, alone)
    assert committed(run_dir.checkpoints) == []
    assert "No such file" in str(events(run_dir, "checkpoint_failed")[0]["reason"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two ranks have saved steps 1 to 3; the last two are kept."""
    run = RunDir(tmp_path_factory.mktemp("saved") / "run")
    run.attempt(1).path.mkdir(parents=True)
    assert not save_in_two_processes(run.path, [1, 2, 3])
    assert [step for step, _ in committed(run.checkpoints)] == [2, 3]
    return run


@pytest.mark.parametrize(
    ("place", "rank"),
    [(place, 0) for place in PLACES] + [(place, 1) for place in PLACES[: PLACES.index("gathered")]],
)
def test_kill_at_any_failpoint_leaves_an_intact_checkpoint(
    saved: RunDir, tmp_path: Path, place: str, rank: int
) -> None:
    run_dir = RunDir(Path(shutil.copytree(saved.path, tmp_path / "run")))
    assert save_in_two_processes(run_dir.path, [4], failpoint=f"{place}:kill", at=rank)
    remove_leftovers(run_dir.checkpoints)
    steps = [step for step, _ in committed(run_dir.checkpoints)]
    is_committed = PLACES.index(place) >= PLACES.index("renamed")
    assert steps[-1] == (4 if is_committed else 3)
    assert len(steps) >= 2
    assert all(holds(run_dir, step) for step in steps)
    assert all(entry.name.startswith("step-") for entry in run_dir.checkpoints.iterdir())
