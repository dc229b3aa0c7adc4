"""A run is a pure function of (config, data, step): stops, kills and other world sizes do not change it."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.sampling.batches import BatchReader, windows_in
from gpt.checkpoint.format import INDEX_NAME, committed, read_index
from gpt.config.run import CheckpointConfig
from gpt.run.events import Event, record_event
from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from gpt.sidecars.checkpoint_mirror import Copier
from launcher.commands.status import status
from tests.distributed.conftest import CONTEXT, Run, make_run, same_state
from tests.distributed.warm_torchrun import start_torchrun
from tests.unit.launcher.support import give_job

NewRun = Callable[..., Run]
CopyRun = Callable[[Run], Run]
UNDRAWN = [str(Path(__file__).with_name("undrawn.py"))]  # in place of -m gpt.train
TIED = {"model__tie_embeddings": True}
# A loss scale of fp16 that a long run may have.
SCALE = {"cur_scale": 4096.0, "cur_iter": 70.0, "last_overflow_iter": 50.0, "cur_hysteresis": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Run:
    """A run of eight steps with tied weights and checkpoints at 4 and 8. Tests copy it."""
    run = make_run(tmp_path_factory.mktemp("finished") / "run", data_dir, **TIED)
    assert run.train()["exit_code"] == 0
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Callable[..., Run]:
    """Finished runs of forty steps without interruption, one for each config."""
    runs: dict[str, Run] = {}

    def find(**fields: Any) -> Run:
        key = str(sorted(fields.items()))
        if key not in runs:
            run = make_run(
                tmp_path_factory.mktemp("undisturbed") / "run", data_dir, schedule__total_steps=40, **fields
            )
            assert run.train()["exit_code"] == 0
            runs[key] = run
        return runs[key]

    return find


@pytest.fixture
def copy_run(tmp_path: Path) -> CopyRun:
    def copy(run: Run) -> Run:
        return Run(RunDir(Path(shutil.copytree(run.dir.path, tmp_path / "copy"))))

    return copy


@pytest.mark.parametrize(
    ("stage", "precision", "micro_batch"),
    [
        (1, "bf16", 2),
        (2, "bf16", 4),
        (3, "bf16", 4),
        pytest.param(1, "fp32", 4, marks=pytest.mark.chaos),  # 27 s, and like the others
    ],
)
def test_resume_continues_bit_for_bit(
    undisturbed: NewRun, new_run: NewRun, stage: int, precision: str, micro_batch: int
) -> None:
    fields = {"zero__stage": stage, "precision": precision, "batch__micro_batch": micro_batch}
    whole = undisturbed(**fields)
    cut = new_run(**fields, schedule__total_steps=40, checkpoint__every_steps=10)
    agent = cut.start()
    cut.wait(lambda: cut.steps() != [])
    agent.kill()
    agent.wait()
    cut.wait(lambda: not cut.living_workers())  # the kernel kills them with their agent
    saved = cut.steps()[-1]
    assert saved < 40
    assert cut.train()["exit_code"] == 0
    assert [event["step"] for event in cut.events("resumed")] == [saved]
    assert cut.losses() == whole.losses()
    assert same_state(cut.state(40), whole.state(40))
    assert cut.metrics()[-1]["val/loss"] == whole.metrics()[-1]["val/loss"]


def test_killed_worker_is_restarted_with_the_same_numbers(undisturbed: NewRun, new_run: NewRun) -> None:
    fields = {"zero__stage": 1, "precision": "fp32", "batch__micro_batch": 4}
    whole, killed = undisturbed(**fields), new_run(**fields, schedule__total_steps=40)
    agent = killed.start(max_restarts=3, cold=True)
    killed.wait_for_step(random.Random(time.time()).randint(5, 30))
    killed.wait(lambda: bool(killed.steps()))  # the first save may still be in flight
    killed.kill_worker(1)
    assert agent.wait(timeout=120) == 0, killed.logs()
    assert len(killed.dir.attempt_numbers()) == 2
    assert len(killed.events("resumed")) == 1
    assert killed.losses() == whole.losses()
    assert same_state(killed.state(40), whole.state(40))


def test_kills_during_a_save_do_not_change_the_run(undisturbed: NewRun, new_run: NewRun) -> None:
    fields = {"zero__stage": 2, "precision": "bf16", "batch__micro_batch": 4}
    whole = undisturbed(**fields)
    killed = new_run(**fields, schedule__total_steps=40, checkpoint__every_steps=6, checkpoint__keep_last=2)
    agent = killed.start(
        max_restarts=3, failpoints=["chunk_written:kill@1", "index_written:kill", "renamed:kill"]
    )
    assert agent.wait(timeout=180) == 0, killed.logs()
    assert len(killed.dir.attempt_numbers()) == 4
    assert [event["step"] for event in killed.events("resumed")] == [6]
    assert killed.losses() == whole.losses()
    assert same_state(killed.state(40), whole.state(40))
    assert not list(killed.dir.checkpoints.glob(".*"))


@pytest.mark.parametrize(
    "way",
    [
        [(3, 3), (2, 1), (3, 2)],
        pytest.param([(1, 1), (2, 2), (3, 1), (1, 3), (1, 2), (2, 3), (1, 1)], marks=pytest.mark.chaos),
    ],
    ids=["short", "long"],
)
def test_state_is_the_same_at_every_stage_and_world_size(
    finished: Run, copy_run: CopyRun, data_dir: Path, way: Sequence[tuple[int, int]]
) -> None:
    """`way` lists pairs of stage and world size; together the two ways cover all nine pairs.

    The runs are in fp16 and carry its loss scale. At the end the network has the validation loss it began
    with.
    """
    moved = copy_run(finished)
    folder = moved.dir.checkpoints / "step-00000008"
    index = read_index(folder)
    scalars = {**index.scalars, **{f"loss_scaler.{name}": value for name, value in SCALE.items()}}
    (folder / INDEX_NAME).write_bytes(index.model_copy(update={"scalars": scalars}).dumps())
    moved.configure(checkpoint__keep_last=20, batch__micro_batch=2, batch__global_batch_tokens=12 * 32)
    last = 8 + len(way) + 1
    moved.configure(precision="fp16", optimizer__peak_lr=1e-9, schedule__total_steps=last)
    # As `outlast resume` records a change that it allows.
    record_event(moved.dir.events, Event.CONFIG_CHANGED, config_fingerprint=index.config_fingerprint)
    original = finished.state(8)
    fingerprint = read_manifest(data_dir).fingerprint
    for step, (stage, processes) in enumerate(way, start=9):
        moved.configure(zero__stage=stage)
        program = [str(Path(__file__).with_name("reload.py")), str(moved.dir.path), fingerprint]
        log = moved.dir.path / "torchrun.log"
        agent = start_torchrun(processes, program, os.environ, log)
        assert agent.wait(timeout=180) == 0, moved.logs()
        assert same_state(moved.state(step), original), (stage, processes)
        assert scalars_of(moved, step) == scalars, (stage, processes)
    assert moved.train(processes=2)["exit_code"] == 0
    assert scalars_of(moved, last) == {**scalars, "loss_scaler.cur_iter": SCALE["cur_iter"] + 1}
    # The learning rate and the rounding errors of fp16 are tiny.
    assert moved.metrics()[-1]["val/loss"] == pytest.approx(finished.metrics()[-1]["val/loss"], rel=1e-5)


def scalars_of(run: Run, step: int) -> Mapping[str, float]:
    return read_index(dict(committed(run.dir.checkpoints))[step]).scalars


def test_resume_at_another_stage_and_world_size_takes_the_same_steps(new_run: NewRun) -> None:
    fields = {"schedule__name": "constant", "batch__micro_batch": 2, "batch__global_batch_tokens": 12 * 32}
    steady, moved = (new_run(**fields) for _ in range(2))
    steady.configure(data__skip=[[20, 24], [60, 72]])
    steady.train(processes=2)
    moved.configure(schedule__total_steps=4, data__skip=[[20, 24]])
    moved.train(processes=2)
    # Sequences that the checkpoint skipped stay skipped, and those that the config names now are added.
    moved.configure(schedule__total_steps=8, zero__stage=3, data__skip=[[60, 72]])
    assert moved.train(processes=3, program=UNDRAWN)["exit_code"] == 0
    assert [event["step"] for event in moved.events("resumed")] == [4]
    np.testing.assert_allclose(moved.losses(), steady.losses(), rtol=1e-4)
    skipped = [read_index(dict(committed(moved.dir.checkpoints))[step]).skipped for step in (4, 8)]
    assert skipped == [((20, 24),), ((20, 24), (60, 72))]
    behind = [line["data/sequences_behind"] for line in moved.metrics()]
    assert behind == [12, 28, 40, 52, 76, 88, 100, 112]


def test_saves_by_time_keep_their_distance_and_a_stop_request_saves_again(new_run: NewRun) -> None:
    run = new_run(schedule__total_steps=10_000, checkpoint__every_steps=5000, evaluation__every_steps=5000)
    run.configure(checkpoint__every_minutes=0.02)
    agent = run.start()
    run.wait(lambda: len(run.events("checkpoint_saved")) >= 3)
    begun = [event["time"] - event["seconds"] for event in run.events("checkpoint_saved")]
    assert min(later - earlier for earlier, later in itertools.pairwise(begun)) > 1.1
    assert run.events("checkpoint_skipped") == []
    asked = time.time()
    run.dir.stop.write_text(json.dumps({"reason": "a test"}))
    assert agent.wait(timeout=60) == 0
    assert run.result()["exit_code"] == 75
    assert ended(run) - asked <= longest_stop(run)
    assert "a test" in run.result()["cause"]
    assert run.steps()[-1] == len(run.losses())


def ended(run: Run) -> float:
    """The time at which the newest attempt wrote its result."""
    return (run.dir.attempt(run.dir.attempt_numbers()[-1]).result).stat().st_mtime


def longest_stop(run: Run) -> float:
    """The seconds that a stop may take: two steps, one and a half saves, and one second."""
    step = max(line["train/step_seconds"] for line in run.metrics()[-10:])
    return float(2 * step + 1.5 * run.events("checkpoint_saved")[-1]["seconds"] + 1.0)


def test_signal_to_one_worker_stops_all_at_the_same_step(new_run: NewRun) -> None:
    run = new_run(schedule__total_steps=10_000, checkpoint__every_steps=5000, evaluation__every_steps=5000)
    agent = run.start()
    run.wait_for_step(3)
    asked = time.time()
    run.kill_worker(1, signal.SIGUSR1)
    assert agent.wait(timeout=60) == 0
    assert run.result()["exit_code"] == 75
    assert "(a signal to another rank); everything is saved" in run.result()["cause"]
    assert ended(run) - asked <= longest_stop(run)
    assert run.steps() == [len(run.losses())]


def test_corrupt_checkpoint_is_reported_and_an_older_one_is_used(finished: Run, copy_run: CopyRun) -> None:
    damaged = copy_run(finished)
    path = damaged.dir.checkpoints / "step-00000008" / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damaged.train(program=UNDRAWN)["exit_code"] == 0
    (rejected,) = damaged.events("checkpoint_rejected")
    assert rejected["path"] == "step-00000008"
    assert "rank-00001.safetensors" in rejected["reason"]
    assert [event["step"] for event in damaged.events("resumed")] == [4]
    assert len(list(damaged.dir.checkpoints.glob(".bad-step-00000008-*"))) == 1
    assert same_state(damaged.state(8), finished.state(8))
    assert damaged.losses() == finished.losses()


def test_run_without_an_intact_checkpoint_ends_with_93_and_not_at_step_0(
    finished: Run, copy_run: CopyRun
) -> None:
    run = copy_run(finished)
    for _, folder in committed(run.dir.checkpoints):
        (folder / "checkpoint.json").write_text("{}")
    assert run.train()["exit_code"] == 93
    assert "none is intact" in run.result()["cause"]
    assert run.losses() == finished.losses()


def test_run_with_deleted_checkpoints_ends_with_93_and_not_at_step_0(
    finished: Run, copy_run: CopyRun
) -> None:
    run = copy_run(finished)
    shutil.rmtree(run.dir.checkpoints)
    assert run.train()["exit_code"] == 93
    assert "none is intact" in run.result()["cause"]


def test_deleted_checkpoints_are_restored_from_the_mirror(
    finished: Run, copy_run: CopyRun, tmp_path: Path
) -> None:
    run = copy_run(finished)
    (tmp_path / "mirrors").mkdir()
    run.configure(checkpoint__mirror=str(tmp_path / "mirrors"), schedule__total_steps=12)
    copier = Copier(run.dir, CheckpointConfig(mirror=str(tmp_path / "mirrors")))
    while copier.copy_next():
        pass
    for _, folder in committed(run.dir.checkpoints):
        (folder / "checkpoint.json").write_text("{}")
    assert run.train()["exit_code"] == 0
    assert [event["step"] for event in run.events("taken_from_mirror")] == [8]
    assert [event["step"] for event in run.events("resumed")] == [8]
    assert same_state(run.state(8), finished.state(8))
    assert run.losses()[:8] == finished.losses()


def test_repeated_attempts_without_a_checkpoint_end_with_93(new_run: NewRun) -> None:
    run = new_run(schedule__total_steps=10_000, checkpoint__every_steps=5000, launch__max_failures=2)
    for _ in range(2):
        agent = run.start(cold=True)
        attempts = len(run.dir.attempt_numbers())
        run.wait(lambda seen=attempts: len(run.dir.attempt_numbers()) > seen)  # type: ignore[misc]
        run.wait(lambda: (run.dir.attempt(run.dir.attempt_numbers()[-1]).owner).exists())
        run.kill_worker(0)
        agent.wait(timeout=60)
    assert run.train()["exit_code"] == 93
    assert "2 attempts in a row" in run.result()["cause"]


def test_checkpoint_of_another_model_is_refused(finished: Run, copy_run: CopyRun) -> None:
    run = copy_run(finished)
    run.configure(schedule__total_steps=12, model__d_ff=64)
    assert run.train()["exit_code"] == 2
    assert "blocks.0.ffn.up.weight is [256, 32] there and [128, 32] in the config" in run.result()["cause"]


def test_every_sequence_of_an_epoch_is_seen_once_at_any_world_size(
    new_run: NewRun, data_dir: Path, tmp_path: Path
) -> None:
    reader = BatchReader([(data_dir, 1.0)], context=CONTEXT, global_batch=12, seed=1234)
    steps = windows_in(reader.tokens, CONTEXT) // 12
    run = new_run(
        batch__global_batch_tokens=12 * CONTEXT,
        batch__micro_batch=2,
        schedule__total_steps=steps,
        checkpoint__every_steps=5,
    )
    trace = tmp_path / "trace"
    trace.mkdir()
    program = [str(Path(__file__).with_name("traced.py")), str(run.dir.path), str(trace)]
    log = run.dir.path / "torchrun.log"
    agent = start_torchrun(2, ["--max-restarts=2", *program], os.environ, log)
    run.wait_for_step(8)
    run.wait(lambda: run.steps() != [])
    run.kill_worker(1)
    run.wait(lambda: len(run.dir.attempt_numbers()) == 2)
    run.wait_for_step(14)
    agent.kill()
    agent.wait()
    run.wait(lambda: not run.living_workers())
    assert start_torchrun(3, program, os.environ, log).wait(timeout=180) == 0, run.logs()
    assert run.result()["exit_code"] == 0
    seen: dict[int, list[int]] = {step: [] for step in range(1, steps + 1)}
    for path in trace.iterdir():
        attempt, step, _ = (int(part) for part in path.name.split("-"))
        last_of_step = max(int(p.name.split("-")[0]) for p in trace.glob(f"*-{step}-*"))
        if attempt == last_of_step:
            seen[step] += [int(number) for number in path.read_text().split()]
    assert [len(numbers) for numbers in seen.values()] == [12] * steps
    places = [reader_place(reader, number) for numbers in seen.values() for number in numbers]
    assert len(set(places)) == 12 * steps


def reader_place(reader: BatchReader, number: int) -> bytes:
    """The tokens of a sequence, which identify its place in the data set."""
    step, row = divmod(number, 12)
    return reader.batch(step + 1, 0, 1).tokens[row].tobytes()


def test_older_copy_of_a_run_exits_without_writing_when_it_wakes_up(new_run: NewRun) -> None:
    fields = {"schedule__total_steps": 60, "checkpoint__every_steps": 5}
    whole, run = new_run(**fields), new_run(**fields)
    assert whole.train()["exit_code"] == 0
    older = run.start(cold=True)
    run.wait(lambda: run.steps() != [])
    frozen = [older.pid, *(worker["pid"] for worker in run.owner()["workers"])]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    newer = run.start(cold=True)
    run.wait(lambda: len(run.events("resumed")) == 1 and len(run.events("checkpoint_saved")) >= 3)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert older.wait(timeout=60) == 0, run.logs()
    assert newer.wait(timeout=120) == 0, run.logs()
    results = [read_json(run.dir.attempt(number).result) for number in (1, 2)]
    assert [result and result["exit_code"] for result in results] == [None, 0]
    assert (
        "Attempt 2 has taken the run over"
        in (run.dir.attempt(1).path / "node-0" / "rank-00000.log").read_text()
    )
    assert run.events("failed") == []  # the older copy has written nothing
    assert run.losses() == whole.losses()
    assert same_state(run.state(60), whole.state(60))


def test_evaluation_that_a_stop_cut_short_is_repeated_after_the_resume(
    finished: Run, new_run: NewRun
) -> None:
    run = new_run(**TIED)
    asked_in_evaluation = Path(__file__).with_name("asked_in_evaluation.py")
    assert run.train(program=[str(asked_in_evaluation)])["exit_code"] == 75
    assert "stopped at step 4 (a signal to another rank); everything is saved" in run.result()["cause"]
    assert "val/loss" not in run.metrics()[-1]
    run.dir.stop.write_text("")
    assert run.train()["exit_code"] == 75  # before its first step
    assert "stopped at step 4 (stop file); nothing new to save" in run.result()["cause"]
    assert run.steps() == [4]
    run.dir.stop.unlink()
    assert run.train()["exit_code"] == 0
    assert [entry.get("val/loss") for entry in run.metrics()] == [
        entry.get("val/loss") for entry in finished.metrics()
    ]
    assert run.losses() == finished.losses()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_training_continues_with_old_checkpoints_on_a_full_or_read_only_disk(
    new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run(schedule__total_steps=10_000, checkpoint__every_steps=20, evaluation__every_steps=5000)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        run = Run(RunDir(Path(shutil.copytree(run.dir.path, small / "run"))))
        agent = run.start()
        run.wait(lambda: run.steps() != [])
        ballast = small / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        run.wait(lambda: not list(run.dir.checkpoints.glob(".tmp-*")) and agent.poll() is None)
        kept = run.steps()
        time.sleep(3)
        assert agent.poll() is None  # many steps and several saves later
        assert run.steps() == kept
        assert len(run.dir.attempt_numbers()) == 1
        ballast.unlink()
        run.wait(lambda: run.steps()[-1] > kept[-1])

        give_job(run.dir, alive=True)
        folder = str(run.dir.checkpoints)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        run.wait(lambda: "Read-only file system" in (status(run.dir).save_problem or ""))
        kept, last_failed = run.steps(), run.events("checkpoint_failed")[-1]
        assert "rank 0 cannot write its checkpoint: [Errno 30]" in last_failed["reason"]
        run.wait_for_step(last_failed["step"] + 50)
        assert run.steps() == kept
        subprocess.run(["umount", "-l", folder], check=True)
        run.wait(lambda: run.steps()[-1] > kept[-1])
        assert len(run.dir.attempt_numbers()) == 1
        run.dir.stop.write_text("")
        assert agent.wait(timeout=60) == 0
        assert run.result()["exit_code"] == 75
        assert run.losses()  # `losses` checks that every step is recorded once
    finally:
        agent.kill()
        run.wait(lambda: not run.living_workers())
        subprocess.run(["umount", "-l", str(small)], check=True)
