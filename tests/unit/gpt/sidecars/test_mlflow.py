"""The mirror in MLflow: every point once, whatever is killed, cut back, or down."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from gpt.sidecars.mlflow import MlflowRun, follow


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    folder = tmp_path / "runs" / "tiny-0001"
    folder.mkdir(parents=True)
    write_json(folder / "provenance.json", {"host": "here"})
    return RunDir(folder)


def config(**tracking: object) -> RunConfig:
    tables = {"name": "tiny", "data": {"path": "x"}, "schedule": {"total_steps": 9}, "tracking": tracking}
    return RunConfig.model_validate(tables)


def add_steps(run_dir: RunDir, first: int, last: int) -> None:
    for step in range(first, last + 1):
        record.append(run_dir.metrics, step=step, tokens=step * 10, **{"train/loss": 1.0 / step})


def history(uri: str, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_restart_continues_the_mlflow_run_and_repeats_no_point(run_dir: RunDir) -> None:
    uri = f"sqlite:///{run_dir.mlflow_database}"
    add_steps(run_dir, 1, 6)
    record_event(run_dir.events, Event("network_built"), attention="sdpa")
    first = MlflowRun(run_dir, config())
    first.send()
    assert MlflowClient(uri).get_run(first.run_id).data.tags["outlast.attention"] == "sdpa"
    record.cut_back(run_dir.metrics, 4)  # what a resume from step 4 does
    add_steps(run_dir, 5, 9)
    second = MlflowRun(run_dir, config())
    second.send()
    second.close()
    assert second.run_id == first.run_id == (read_json(run_dir.provenance) or {})["mlflow_run_id"]
    assert history(uri, first.run_id) == [(step, 1.0 / step) for step in range(1, 10)]
    assert MlflowClient(uri).get_run(first.run_id).data.params["schedule.total_steps"] == "9"


def test_scores_added_to_a_sent_line_are_sent_once(run_dir: RunDir) -> None:
    uri = f"sqlite:///{run_dir.mlflow_database}"
    add_steps(run_dir, 1, 2)
    mirror = MlflowRun(run_dir, config())
    mirror.send()
    record.amend_last(run_dir.metrics, **{"val/loss": 3.0})
    for _ in range(2):
        MlflowRun(run_dir, config()).send()
    assert history(uri, mirror.run_id, "val/loss") == [(2, 3.0)]
    assert history(uri, mirror.run_id) == [(1, 1.0), (2, 0.5)]


def test_points_keep_their_original_time(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 1)
    happened = next(record.read(run_dir.metrics))["time"]
    mirror = MlflowRun(run_dir, config())
    mirror.send()
    (point,) = mirror.client.get_metric_history(mirror.run_id, "train/loss")
    assert point.timestamp == int(happened * 1000)


def test_copied_run_directory_gets_its_own_mlflow_run(run_dir: RunDir) -> None:
    import shutil

    add_steps(run_dir, 1, 2)
    first = MlflowRun(run_dir, config())
    first.send()
    copy = RunDir(run_dir.path.with_name("tiny-copy"))
    shutil.copytree(run_dir.path, copy.path)
    second = MlflowRun(copy, config())
    second.send()
    assert second.run_id != first.run_id
    assert len(second.client.get_metric_history(second.run_id, "train/loss")) == 2


@pytest.mark.parametrize(("exit_code", "status"), [(0, "FINISHED"), (75, "FINISHED"), (93, "FAILED")])
def test_mlflow_status_is_how_the_run_ended(run_dir: RunDir, exit_code: int, status: str) -> None:
    run_dir.attempt(1).path.mkdir(parents=True)
    write_json(run_dir.attempt(1).result, {"exit_code": exit_code, "cause": "so it was"})
    mirror = MlflowRun(run_dir, config())
    mirror.close()
    run = mirror.client.get_run(mirror.run_id)
    assert run.info.status == status
    assert run.data.tags["outlast.cause"] == "so it was"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address and command of an MLflow server that is not running yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    yield f"http://127.0.0.1:{port}", [*command, "--backend-store-uri", store]


def test_server_that_starts_late_gets_every_point(
    run_dir: RunDir, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("gpt.sidecars.mlflow.RETRY_S", 0.5)
    monkeypatch.setattr(
        "gpt.sidecars.mlflow.DRAIN_S", 170.0
    )  # on a busy machine the server starts for a minute
    uri, command = server
    run = config(uri=uri)
    add_steps(run_dir, 1, 5)
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(run_dir, run, ended))
    thread.start()
    time.sleep(1.5)
    assert thread.is_alive()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        add_steps(run_dir, 6, 9)
        ended.set()
        thread.join(timeout=180)
        assert not thread.is_alive()
        run_id = (read_json(run_dir.tracking) or {})["run_id"]
        assert history(uri, run_id) == [(step, 1.0 / step) for step in range(1, 10)]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_server_that_never_starts_is_given_up_at_the_end(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("gpt.sidecars.mlflow.RETRY_S", 0.2)
    monkeypatch.setattr("gpt.sidecars.mlflow.DRAIN_S", 1.0)
    add_steps(run_dir, 1, 3)
    ended = threading.Event()
    ended.set()
    follow(run_dir, config(uri="http://127.0.0.1:9"), ended)
    assert "gave up; the lines that were not sent stay in the record" in capfd.readouterr().out
    assert len(list(record.read(run_dir.metrics))) == 3
