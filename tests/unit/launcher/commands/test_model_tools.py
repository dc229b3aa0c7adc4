"""The commands that run torch or MLflow in a child process."""

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
