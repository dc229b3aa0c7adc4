"""What the site and the tracker say beforehand; Slurm's answers are tested on a real one (tests/slurm)."""

import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.slurm_commands import Preemption
from launcher.scheduler.slurm_site import (
    check_partitions,
    check_qos,
    check_shared,
    check_site,
    check_time,
    check_tracker,
    file_system,
)


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


LOW = {"PartitionName": "low", "MaxTime": "UNLIMITED", "MaxNodes": "8", "PreemptMode": "OFF"}
SHORT = {"PartitionName": "short", "MaxTime": "01:00:00", "MaxNodes": "UNLIMITED", "PreemptMode": "OFF"}


def of_partitions(*partitions: dict[str, str], preemption: str = "preempt/none", **fields: Any) -> Findings:
    findings = Findings()
    how = Preemption(preemption, "REQUEUE")
    check_partitions(ClusterConfig(kind="slurm", **fields), partitions, how, 25.0, findings)
    return findings


def test_what_no_partition_of_a_list_allows_is_refused_and_what_one_does_not_is_warned_of() -> None:
    assert of_partitions(LOW, SHORT, nodes=8, time_limit="01:00:00") == Findings()
    found = of_partitions(LOW, SHORT, time_limit="02:00:00")
    assert found.problems == []
    assert found.warnings == [
        "time_limit = 02:00:00 is more than partition short allows (01:00:00): the job never starts there."
    ]
    found = of_partitions(LOW, SHORT, time_limit="02:00:00", nodes=9)
    assert found.problems == [
        "nodes = 9 is more than partition low allows (8): the job would wait for ever. Ask for less; the run "
        "takes as many turns as it needs.",
        "time_limit = 02:00:00 is more than partition short allows (01:00:00): the job would wait for ever. "
        "Ask for less; the run takes as many turns as it needs.",
    ]
    assert found.warnings == []
    assert of_partitions(nodes=9) == Findings()  # Slurm said nothing
    down = of_partitions({**LOW, "State": "DOWN"})
    assert down.warnings == ["partition low is DOWN: nothing starts there now."]


@pytest.mark.parametrize(
    ("preemption", "mode", "grace", "words"),
    [
        ("preempt/partition_prio", "REQUEUE", "0", "partition p preempts without a grace time (GraceTime=0)"),
        ("preempt/partition_prio", "REQUEUE", "30", None),
        (
            "preempt/partition_prio",
            "REQUEUE",
            "20",
            "partition p preempts with a grace time of 20 s, and a "
            "checkpoint takes about 25 s: what came after the last one is then lost and computed again.",
        ),
        ("preempt/partition_prio", "CANCEL", "0", "partition p preempts by ending jobs for good, without a"),
        ("preempt/partition_prio", "CANCEL", "30", None),
        ("preempt/partition_prio", "GANG,SUSPEND", "0", None),
        ("preempt/partition_prio", "OFF", "0", None),
        ("preempt/qos", "REQUEUE", "0", None),
        ("preempt/none", "REQUEUE", "0", None),
    ],
)
def test_a_preemption_that_leaves_no_time_to_save_is_warned_of(
    preemption: str, mode: str, grace: str, words: str | None
) -> None:
    partition = {"PartitionName": "p", "PreemptMode": mode, "GraceTime": grace}
    found = of_partitions(partition, preemption=preemption)
    assert found.problems == []
    assert [warning[: len(words or "")] for warning in found.warnings] == ([words] if words else [])


def test_the_limits_of_a_qos_are_those_of_a_job_a_user_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "1-00:00:00|cpu=64,gres/gpu=8,node=2|node=4|gres/gpu=32|cluster|00:01:00"
    monkeypatch.setattr(
        slurm, "_ask", lambda command: subprocess.CompletedProcess(command, 0, said + "\n", "")
    )

    def of_qos(preemption: str = "preempt/none", save_s: float = 59.0, **fields: Any) -> Findings:
        findings = Findings()
        cluster = ClusterConfig(kind="slurm", qos="spare", **fields)
        check_qos(cluster, slurm.qos_fields("spare"), Preemption(preemption, "REQUEUE"), save_s, findings)
        return findings

    assert of_qos(nodes=2, gpus_per_node=4, cpus_per_process=8, time_limit="24:00:00") == Findings()
    found = of_qos(nodes=5, gpus_per_node=8, cpus_per_process=2, time_limit="1-00:01:00")
    assert found.problems[0] == (
        "time_limit = 1-00:01:00 is more than qos spare allows (1-00:00:00): the job would wait for ever. "
        "Ask for less; the run takes as many turns as it needs."
    )
    remedy = ": the job would wait for ever. Ask for less, or for another qos."
    assert found.problems[1:] == [
        "80 × cpu is more than qos spare allows (MaxTRES: cpu=64)" + remedy,
        "40 × gres/gpu is more than qos spare allows (MaxTRES: gres/gpu=8)" + remedy,
        "5 × node is more than qos spare allows (MaxTRES: node=2)" + remedy,
        "5 × node is more than qos spare allows (MaxTRESPU: node=4)" + remedy,
        "40 × gres/gpu is more than qos spare allows (GrpTRES: gres/gpu=32)" + remedy,
    ]
    assert of_qos("preempt/qos") == Findings()
    [warning] = of_qos("preempt/qos", save_s=61.0).warnings
    assert warning.startswith(
        "qos spare preempts with a grace time of 60 s, and a checkpoint takes about 61 s"
    )
    monkeypatch.setattr(slurm, "_ask", lambda _command: None)
    assert of_qos("preempt/qos", nodes=99) == Findings()


def test_a_cluster_file_that_forbids_requeueing_and_an_image_that_is_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "_ask", lambda _command, _question=None: None)  # Slurm is silent
    monkeypatch.setattr("launcher.scheduler.slurm_site.file_system", lambda _path: "lustre")
    image = tmp_path / "a.sif"
    fields = {"kind": "slurm", "sbatch": {"requeue": False}}
    container = {"runtime": "apptainer", "image": str(image)}
    findings = Findings()
    cluster = ClusterConfig.model_validate({**fields, "container": container})
    check_site(RunDir(tmp_path / "run"), config(), cluster, findings)
    assert findings.problems == [f"container.image = {image}: no such file."]
    assert findings.warnings == [
        "the cluster file turns requeueing off: a preempted job does not come back by itself. "
        "`outlast resume` continues it by hand."
    ]
    image.touch()
    findings = Findings()
    check_site(RunDir(tmp_path / "run"), config(), cluster.model_copy(update={"sbatch": {}}), findings)
    assert findings == Findings()


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
    monkeypatch.setattr("launcher.scheduler.slurm_site.file_system", lambda path: kinds[path])
    findings = Findings()
    check_shared(list(kinds), findings)
    assert findings.warnings == [
        "/a lies on tmpfs, which other machines usually do not see; every node of the job must."
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
