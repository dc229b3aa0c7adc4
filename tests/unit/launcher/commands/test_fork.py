"""`launch --from`: a new run starts from another run's checkpoint, or is refused before a file is written."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import CheckpointError, ConfigError, LaunchError
from gpt.checkpoint.format import committed, verify
from gpt.checkpoint.reader import CheckpointReader
from gpt.config.resume_rules import config_fingerprint
from gpt.run.events import Event, read_events
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from gpt.saving.restore import has_begun
from launcher.cluster import ClusterConfig
from launcher.commands import follow_job
from launcher.commands.launch import launch
from launcher.commands.resume import resume
from launcher.preflight.check import examine
from launcher.runs.recipes import run_tables
from launcher.runs.store import create_run, read_config
from tests.unit.gpt.checkpoint.support import flat_state, write_checkpoint
from tests.unit.launcher.support import end_job, give_job


@pytest.fixture
def origin(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with checkpoints of steps 5 and 10; every job that is submitted succeeds at once."""

    def submit(run: RunDir, _reason: str) -> Job:
        job = give_job(run, alive=False)
        end_job(run, 0, "done")
        return job

    monkeypatch.setattr(follow_job, "submit", submit)
    tables, source = run_tables("tiny", [f"data.path={data}"])
    request = examine(tables, source, ClusterConfig(kind="local"), tmp_path / "origin")
    run = create_run(tmp_path / "origin", request, ["outlast"])
    config = read_config(run)
    fingerprint = joint_fingerprint([read_manifest(source.path) for source in config.data.sources])
    for step in (5, 10):
        write_checkpoint(run.checkpoints, step=step, config=config, data_fingerprint=fingerprint)
    return run


def refuse(path: Path, _to: Path) -> NoReturn:
    """Fail like a hard link across file systems."""
    raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))


def launch_from(origin: RunDir, data: Path, at: str, *settings: str) -> RunDir:
    folder = origin.path.with_name("fork")
    overrides = [f"data.path={data}", *settings]
    start = f"{origin.path}{at}"
    assert launch("tiny", "local", overrides, folder, origin=start, dry_run=False, attend=False) == 0
    return RunDir(folder)


def test_a_new_run_starts_from_a_checkpoint_of_another_run(origin: RunDir, data: Path) -> None:
    run = launch_from(origin, data, "@5", "optimizer.peak_lr=1e-4")
    ((step, folder),) = committed(run.checkpoints)
    assert step == 5
    assert list(verify(folder)) == []
    reader = CheckpointReader(folder)
    assert reader.index.config_fingerprint == config_fingerprint(read_config(run))
    for group in reader.index.groups:
        for state in group.states:
            whole = reader.read(group.name, state, 0, group.numel)
            assert np.array_equal(whole, flat_state(group.name, state, group.numel))
    (forked,) = read_events(run.events, Event.FORKED)
    assert (forked["run"], forked["step"]) == ("origin", 5)


def test_across_file_systems_the_files_are_copied_synced_and_verified(
    origin: RunDir, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(
        "launcher.commands.fork.record", SimpleNamespace(sync=lambda path: synced.append(path.name))
    )
    run = launch_from(origin, data, "@5")
    ((_, folder),) = committed(run.checkpoints)
    assert list(verify(folder)) == []
    assert sorted(synced) == [f"rank-0000{rank}.safetensors" for rank in range(3)]


def test_a_copy_that_differs_is_never_committed(
    origin: RunDir, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_badly(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr("launcher.commands.fork.shutil", SimpleNamespace(copyfile=copy_badly))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors differs from its source in"):
        launch_from(origin, data, "@5")
    assert committed(RunDir(origin.path.with_name("fork")).checkpoints) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "optimizer.name=muon",
            "its optimizer keeps blocks.0.attention.output.weight in group decay from element 274432 on, "
            "with states master, exp_avg, exp_avg_sq; this config wants it in group muon from element "
            "12288 on, with states master, momentum_buffer",
        ),
        ("model.d_model=32", r"is [64, 64] there and [32, 32] in the config"),
        (
            "model.n_layers=1",
            "parameter blocks.1.attention.output.weight is [64, 64] there and absent in the",
        ),
        (
            "schedule.total_steps=10",
            "step 10 is not before the end of the new run, schedule.total_steps = 10",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_new_config_is_refused_before_a_file_is_written(
    origin: RunDir, data: Path, setting: str, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        launch_from(origin, data, "", setting)
    assert words in str(error.value)
    assert not origin.path.with_name("fork").exists()


def test_a_resume_with_another_optimizer_is_refused_before_a_file_changes(
    origin: RunDir,
) -> None:
    before = origin.config.read_bytes()
    muon, allowed = ["optimizer.name=muon"], ["optimizer"]
    with pytest.raises(ConfigError, match="step 10 does not fit this config: its optimizer keeps blocks"):
        resume(str(origin.path), None, muon, None, attend=False, allowed=allowed)
    assert origin.config.read_bytes() == before


def test_a_run_that_was_interrupted_before_its_first_checkpoint_does_not_start_from_new_weights(
    origin: RunDir, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.commands.launch.seed_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch_from(origin, data, "@5")
    run = RunDir(origin.path.with_name("fork"))
    with pytest.raises(LaunchError, match="was to start from step 5 of origin, and that checkpoint is not"):
        resume(str(run.path), None, [], None, attend=False)
    assert has_begun(run)  # so workers that are started by other means refuse, too
    assert not run.job.exists()


def test_the_event_of_a_run_that_starts_from_weights_is_there_before_its_config(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.runs.store.snapshot_code", interrupted)
    tables, source = run_tables("tiny", [f"data.path={data}"])
    request = examine(tables, source, ClusterConfig(kind="local"), tmp_path / "imported")
    with pytest.raises(KeyboardInterrupt):
        create_run(tmp_path / "imported", request, ["outlast"], {Event.IMPORTED: {"step": 0}})
    run = RunDir(tmp_path / "imported")
    assert has_begun(run)
    assert not run.config.exists()
