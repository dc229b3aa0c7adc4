"""Sweeps: which grids are valid, which runs they make, and how a sweep is continued."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError, LaunchError
from gpt.run.json_file import write_json
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.commands.sweep import SweepConfig, examine_points, points_of, show_results
from launcher.commands.sweep import sweep as continue_sweep
from launcher.process_tree import identity
from launcher.runs.sweep_index import sweep_runs
from launcher.scheduler.jobs import claim_start
from tests.unit.launcher.support import job_record, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def sweep(**tables: Any) -> SweepConfig:
    return validate(SweepConfig, {"run": "tiny", **tables}, "sweep.toml")


def test_every_combination_is_a_point_with_its_own_name() -> None:
    config = sweep(grid={"optimizer": {"peak_lr": [1e-3, 3e-3]}, "seed": [1, 2, 3]})
    points = points_of(config)
    assert len(points) == len({point.folder for point in points}) == 6
    assert points[0].folder == "0001_peak_lr=0.001_seed=1"
    assert points[-1].fields == {"optimizer.peak_lr": 3e-3, "seed": 3}


def test_values_that_are_tables_reach_the_config_unchanged(data: Path, tmp_path: Path) -> None:
    mixtures = [[{"path": str(data), "weight": weight}] for weight in (1, 2)]
    config = sweep(set={"batch": {"micro_batch": 2}}, grid={"data.mixture": mixtures})
    requests = examine_points(config, points_of(config), "local", tmp_path)
    assert [request.config.data.mixture[0].weight for request in requests] == [1, 2]
    assert {request.config.batch.micro_batch for request in requests} == {2}


def test_problems_of_all_points_are_reported_at_once(tmp_path: Path) -> None:
    config = sweep(grid={"model.n_layer": [1], "batch.micro_batch": [0]})
    with pytest.raises(ConfigError) as error:
        examine_points(config, points_of(config), "local", tmp_path)
    assert "did you mean 'model.n_layers'?" in str(error.value)
    assert "batch.micro_batch = 0" in str(error.value)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "grid: a list of values is needed"),
        ({"seed": []}, "grid.seed: a list of values is needed"),
        ({"seed": 1}, "grid.seed: a list of values is needed"),
        ({str(i): list(range(8)) for i in range(10)}, "grid: 1073741824 combinations are more than 1000"),
    ],
)
def test_invalid_grid_is_refused(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep(grid=grid)


@pytest.fixture
def home(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three runs with a fake submission: each run is finished as soon as it starts."""
    (tmp_path / "sweep.toml").write_text(
        f'run = "tiny"\n[set]\ndata.path = "{data}"\ntracking.enabled = false\n[grid]\nseed = [1, 2, 3]\n'
    )

    def submit(run: RunDir, _reason: str) -> Job:
        job = job_record(1, "local", "1", socket.gethostname(), None, None, run.path.stat().st_ino, 0.0)
        job.write(run.job)
        folder = run.submission(1).path
        folder.mkdir(parents=True)
        write_json(folder / "outcome.json", {"exit_code": 0, "cause": "done", "attempt": 1})
        (run.checkpoints / "step-00000020").mkdir()
        (run.checkpoints / "step-00000020" / "checkpoint.json").write_text("{}")
        return job

    monkeypatch.setattr("launcher.commands.follow_job.submit", submit)
    monkeypatch.setattr("launcher.commands.sweep._one_after_the_other", lambda _runs: 0)
    assert continue_sweep(tmp_path / "sweep.toml", None, tmp_path / "sweep", attend=None) == 0
    monkeypatch.undo()
    monkeypatch.setattr("launcher.commands.follow_job.submit", submit)
    return tmp_path / "sweep"


def started(home: Path) -> list[str]:
    return [run.path.name for run in sweep_runs(home) or [] if run.job.exists()]


def test_broken_or_starting_run_is_left_out_and_the_others_start(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = sweep_runs(home) or []
    first.config.write_text("{")
    with claim_start(second):
        assert continue_sweep(home, None, None, attend=None) == 1
    assert started(home) == ["0003_seed=3"]
    shown = capsys.readouterr()
    assert "0001_seed=1 is left out: " in shown.err
    assert "config.json is not readable as JSON" in shown.err
    assert f"0002_seed=2 is left out: {second.path} is being started by another command" in shown.err
    show_results(home, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["fields"]["seed"], row["state"]) for row in rows] == [
        (1, "unreadable"),
        (2, "created"),
        (3, "finished"),
    ]
    assert continue_sweep(home, None, None, attend=None) == 1
    assert started(home) == ["0002_seed=2", "0003_seed=3"]


def test_sweep_is_continued_by_one_command_at_a_time(home: Path) -> None:
    with (
        claim_start(RunDir(home)),
        pytest.raises(LaunchError, match=rf"^{home} is being started by another command"),
    ):
        continue_sweep(home, None, None, attend=None)
    assert started(home) == []


def test_run_with_a_job_that_may_be_alive_is_not_started_by_its_sweep(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alive, elsewhere, _ = sweep_runs(home) or []
    for run, host in ((alive, socket.gethostname()), (elsewhere, "not-here")):
        job = job_record(
            1, "local", "1", host, os.getpid(), identity(os.getpid()), run.path.stat().st_ino, 0.0
        )
        job.write(run.job)
    before = [run.job.read_bytes() for run in (alive, elsewhere)]
    assert continue_sweep(home, None, None, attend=None) == 1
    assert [run.job.read_bytes() for run in (alive, elsewhere)] == before
    said = capsys.readouterr().err
    assert (
        "0002_seed=2 is left out: it is not known here whether its job 1 has ended (started on not-here)"
        in said
    )
    assert "0001" not in said


def test_damaged_or_missing_sweep_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"points": [{"fields": {}}]}')
    with pytest.raises(ConfigError, match=r"sweep\.json: points\.0\.folder is missing and has no default"):
        show_results(tmp_path)
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(LaunchError, match=r"is not a sweep: it has no sweep\.json\.$"):
        continue_sweep(tmp_path, None, None, attend=None)
