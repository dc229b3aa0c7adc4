"""What the site and the tracker say beforehand; Slurm's answers are tested on a real one (tests/slurm)."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt.config import RunConfig
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.site import check_shared, check_time, check_tracker, file_system


def config(**tables: object) -> RunConfig:
    base = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}, **tables}
    return RunConfig.model_validate(base).resolve(4096)


def test_a_time_limit_shorter_than_the_warning_before_it_is_refused() -> None:
    findings = Findings()
    check_time(config(), ClusterConfig(kind="slurm", time_limit="0:02:00"), findings)
    [problem] = findings.problems
    assert problem.startswith(
        "time_limit = 0:02:00 leaves no time to train: the job is told to save signal_delay_s = 90 s"
    )
    findings = Findings()
    check_time(config(), ClusterConfig(kind="slurm", time_limit="0:02:00", signal_delay_s=30), findings)
    assert findings == Findings()


def test_a_warning_shorter_than_a_save_takes_is_warned_of() -> None:
    model = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "d_ff": 11008}  # Llama-7B: 6.7e9 × 12 bytes
    findings = Findings()
    cluster = ClusterConfig(kind="slurm", time_limit="24:00:00", signal_delay_s=30, nodes=1)
    check_time(config(model=model), cluster, findings)
    assert findings.problems == []
    [warning] = findings.warnings
    assert warning.startswith("signal_delay_s = 30 is short for a checkpoint of 7")
    findings = Findings()
    check_time(config(model=model), cluster.model_copy(update={"nodes": 4}), findings)
    assert findings.warnings == []


MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sda1 /home/local ext4 rw 0 0
lfs@tcp:/scratch /scratch\\040space lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc", "overlay"),
        ("/tmp/runs/x", "tmpfs"),
        ("/home/me/runs", "nfs4"),
        ("/home/local/x", "ext4"),
        ("/homework", "overlay"),
        ("/scratch space/x", "lustre"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(path: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert file_system(Path(path), tmp_path / "mounts") == kind


def test_a_disk_that_other_machines_do_not_see_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {Path("/a"): "tmpfs", Path("/b"): "lustre", Path("/c"): None}
    monkeypatch.setattr("launcher.site.file_system", lambda path: kinds[path])
    findings = Findings()
    check_shared(list(kinds), findings)
    assert findings.warnings == [
        "/a lies on tmpfs, which other machines usually do not see; all nodes of the job must."
    ]


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


def test_a_tracker_that_answers_is_fine_and_one_that_does_not_is_warned_of(
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
