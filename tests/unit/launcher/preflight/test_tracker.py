"""The check of the tracking server before a launch, against a real HTTP server."""

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from gpt.config.run import RunConfig
from launcher.findings import Findings
from launcher.preflight.tracker import check_tracker


def config(**tables: object) -> RunConfig:
    base = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}, **tables}
    return RunConfig.model_validate(base).resolve(4096)


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_tracking_server_that_does_not_answer_warns(
    server: http.server.HTTPServer,
) -> None:
    uri = f"http://127.0.0.1:{server.server_port}"
    findings = Findings()
    check_tracker(config(tracking={"uri": uri}), findings)
    check_tracker(config(tracking={"uri": "sqlite:////nowhere.db"}), findings)
    check_tracker(config(tracking={"uri": "http://127.0.0.1:1", "enabled": False}), findings)
    assert findings == Findings()
    check_tracker(config(tracking={"uri": "http://127.0.0.1:1"}), findings)
    assert findings.problems == []
    [warning] = findings.warnings
    assert warning.startswith("tracking.uri = http://127.0.0.1:1 does not answer from here ([Errno 111]")


def test_a_port_that_speaks_another_protocol_warns() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        findings = Findings()
        check_tracker(config(tracking={"uri": f"http://127.0.0.1:{listener.getsockname()[1]}"}), findings)
        thread.join()
    [warning] = findings.warnings
    assert "does not answer from here (SSH-2.0-OpenSSH_9.6" in warning
