"""The commands that run torch or MLflow in a child process."""

from pathlib import Path

import pytest

from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from launcher.commands.model_tools import tracking_uri, ui


def test_runs_are_tracked_next_to_their_folder_or_where_their_config_says(run: RunDir) -> None:
    assert tracking_uri(run.path) == f"sqlite:///{run.path.parent / 'mlflow.db'}"
    assert tracking_uri(run.path.parent) == f"sqlite:///{run.path.parent / 'mlflow.db'}"
    config = read_json(run.config)
    assert config is not None
    write_json(run.config, {**config, "tracking": {"uri": "http://tracker:5000"}})
    assert tracking_uri(run.path) == "http://tracker:5000"


def test_ui_prints_the_address_of_a_running_server(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_json(run.config)
    assert config is not None
    write_json(run.config, {**config, "tracking": {"uri": "http://tracker:5000"}})
    assert ui(run.path, 5000) == 0
    assert capsys.readouterr().out == "http://tracker:5000\n"


def test_a_link_to_a_run_is_tracked_where_the_run_is(run: RunDir, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(run.path)
    assert tracking_uri(link) == tracking_uri(run.path) == f"sqlite:///{run.path.parent / 'mlflow.db'}"


def test_the_runs_of_a_sweep_are_tracked_with_those_beside_the_sweep(run: RunDir, tmp_path: Path) -> None:
    sweep = RunDir(tmp_path / "runs" / "sweep-0001")
    point = RunDir(sweep.path / "0001_seed=1")
    point.path.mkdir(parents=True)
    point.config.write_bytes(run.config.read_bytes())
    write_json(sweep.sweep, {"points": []})
    expected = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert [tracking_uri(folder) for folder in (sweep.path.parent, sweep.path, point.path)] == [expected] * 3
    (sweep.path / "mlflow.db").touch()  # of an earlier version
    assert [tracking_uri(folder) for folder in (sweep.path, point.path)] == [
        f"sqlite:///{sweep.path / 'mlflow.db'}"
    ] * 2
