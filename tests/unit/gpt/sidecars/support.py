"""Runs and MLflow stores for the tests of the sidecars."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir, mlflow_database_in
from gpt.sidecars.mlflow_store import create_database


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a run: creating them takes seconds, copying the file does not."""
    path = mlflow_database_in(tmp_path_factory.mktemp("database"))
    create_database(path)
    return path


@pytest.fixture
def run_dir(tmp_path: Path, empty_database: Path) -> RunDir:
    return new_run(tmp_path / "runs", empty_database)


def new_run(folder: Path, database: Path) -> RunDir:
    """A run directory in a new `folder`, next to a copy of `database`."""
    run = RunDir(folder / "tiny-0001")
    run.path.mkdir(parents=True)
    shutil.copy(database, run.mlflow_database)
    write_json(run.provenance, {"host": "here"})
    write_json(run.config, config().model_dump(mode="json", exclude_none=True))
    return run


def config(**tracking: object) -> RunConfig:
    tables = {"name": "tiny", "data": {"path": "/x/corpus"}, "schedule": {"total_steps": 9}}
    return RunConfig.model_validate({**tables, "tracking": tracking}).resolve(512)


def add_steps(run_dir: RunDir, first: int, last: int, *, factor: float = 1.0) -> None:
    """Append lines; `factor` makes the losses of another course differ."""
    for step in range(first, last + 1):
        record.append(run_dir.metrics, step=step, tokens=step * 10, **{"train/loss": factor / step})


def history(uri: str, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    """Every point of a metric in MLflow, in the order of steps and times."""
    points = MlflowClient(uri).get_metric_history(run_id, name)
    ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
    return [(point.step, point.value) for point in ordered]


def recorded(run_dir: RunDir, name: str = "train/loss") -> list[tuple[int, float]]:
    """Every value of a metric in the record."""
    return [(line["step"], line[name]) for line in record.read(run_dir.metrics) if name in line]


class Server:
    """An MLflow server that runs from the first call of `start`."""

    def __init__(self, database: Path, artifacts: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is None:
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            quiet["env"] = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(self._command, start_new_session=True, **quiet)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "server.db")
    found = Server(folder / "server.db", folder / "artifacts")
    yield found
    found.stop()
