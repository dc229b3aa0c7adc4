"""The commands that run torch or MLflow in a child process."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir, mlflow_database_in
from launcher.commands.model_tools import sync, tracking_uri, ui
from tests.unit.launcher.commands.support import record_step
from tests.unit.launcher.support import end_job, give_job


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ui_refuses_a_port_that_another_process_has(tmp_path: Path) -> None:
    mlflow_database_in(tmp_path).touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} cannot be used .* for example --port {port + 1}"):
            ui(tmp_path, port)


def test_ui_sends_the_rest_and_prints_the_address_of_the_runs_once_the_server_answers(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLflow's own server is started; it takes a while."""
    record_step(run, 3)
    give_job(run, alive=True)
    with pytest.raises(LaunchError, match="already has a job"):
        sync([str(run.path)])
    end_job(run, 0, "done")
    assert sync([str(run.path)]) == 0
    assert capfd.readouterr().out == f"{run.path}: MLflow has everything up to step 3\n"
    run_id = (read_json(run.tracking) or {})["run_id"]
    served = "import sys; from launcher.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", served, "ui", str(run.path), "--port", str(port := free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        found = re.fullmatch(rf"http://127.0.0.1:{port}/#/experiments/(\d+)/runs/{run_id}", address)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert found is not None
