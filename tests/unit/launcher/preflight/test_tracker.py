"""The check of MLflow's URI, experiment and server before a launch, against a real HTTP server."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt.config.run import RunConfig
from launcher.findings import Findings
from launcher.preflight.tracker import check_tracker


def config(**tables: object) -> RunConfig:
    base = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}, **tables}
    return RunConfig.model_validate(base).resolve(4096)


def found(**tracking: object) -> Findings:
    findings = Findings()
    check_tracker(config(tracking=tracking), findings)
    return findings


class _Healthy(http.server.BaseHTTPRequestHandler):
    """Healthy like MLflow, whose /health needs no login; `refusal` is the answer to everything else."""

    refusal = (404, b"")

    def do_GET(self) -> None:
        code, body = (200, b"OK") if self.path == "/health" else self.refusal
        if self.headers.get("Authorization") == "Basic bWU6c2VjcmV0":
            code, body = 200, b"{}"
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_settings_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def test_tracking_server_that_does_not_answer_warns(server: http.server.HTTPServer, tmp_path: Path) -> None:
    assert found(uri=f"http://127.0.0.1:{server.server_port}") == Findings()
    assert found(uri=f"sqlite:///{tmp_path}/new/mlflow.db") == Findings()
    assert found(uri="http://127.0.0.1:1", enabled=False) == Findings()
    findings = found(uri="http://127.0.0.1:1")
    assert findings.problems == []
    [warning] = findings.warnings
    assert warning.startswith("tracking.uri = http://127.0.0.1:1 does not answer from here ([Errno 111]")


def test_a_server_that_refuses_is_told_from_one_that_does_not_answer(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(_Healthy, "refusal", (401, b"You are not authenticated"))
    [warning] = found(uri=uri).warnings
    assert "asks for a login (401)" in warning and "MLFLOW_TRACKING_USERNAME" in warning
    monkeypatch.setattr(_Healthy, "refusal", (403, b"Invalid Host header - possible DNS rebinding attack"))
    [warning] = found(uri=uri).warnings
    assert "(403): it does not know this host name: start it with --allowed-hosts" in warning
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert found(uri=uri) == Findings()


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("localhost:5000", "has no scheme such as http://. Did you mean http://localhost:5000?"),
        ("htp://x", "has the scheme 'htp', which MLflow does not know"),
        ("", "has no scheme"),
        ("/some/folder", "has no scheme"),
        ("file:///some/folder", "names a folder of plain files"),
        ("http://", "names no host"),
        ("http://localhost:5000x", "is not a valid address"),
        ("http://localhost:99999", "is not a valid address"),
        ("http://[::1", "is not a valid address"),
        ("http://my host:5000", "has a space or a control character"),
        ("http://host\x07:5000", "has a space or a control character"),
        ("postgres://host/db", "Write postgresql://host/db"),
        ("postgresql+nothing://host/db", "is no URI of a database that can be used here"),
        ("mssql+pymssql://me:secret@host/db", "needs the Python package 'pymssql', which is not installed"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////bin/sh/mlflow.db", "cannot be written"),
        ("sqlite:////tmp", "is a folder"),
        ("sqlite:////bin/sh", "is a file, but not an SQLite database"),
    ],
)
def test_a_uri_that_can_never_work_is_refused(uri: str, part: str) -> None:
    findings = found(uri=uri)
    assert findings.warnings == []
    [problem] = findings.problems
    assert problem.startswith("tracking.uri = ")
    assert part in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("experiment", "part"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("x" * 600, "has 600 characters"),
        ("a\nb", "a control character"),
    ],
)
def test_an_experiment_that_mlflow_cannot_create_is_refused(experiment: str, part: str) -> None:
    [problem] = found(experiment=experiment).problems
    assert part in problem


def test_a_port_that_speaks_another_protocol_is_a_warning() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        [warning] = found(uri=f"http://127.0.0.1:{listener.getsockname()[1]}").warnings
    assert "does not answer from here" in warning


def test_a_variable_of_mlflow_that_is_ignored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracker:5000")
    [warning] = found().warnings
    assert warning.startswith("MLFLOW_TRACKING_URI = http://…@tracker:5000 is not used")
    assert found(uri="sqlite:////tmp/x.db").warnings == []
