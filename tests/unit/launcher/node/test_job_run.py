"""Job runs in Slurm that fail: the node task requeues the job, and gives up after several failures."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt.run import record
from gpt.run.json_file import read_json, write_json
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.node.task import NodeRunner
from launcher.node.torchrun import TorchrunEnd
from tests.unit.launcher.fake_slurm import FakeJob, FakeSlurm
from tests.unit.launcher.support import job_outcome, make_run

NEVER = "raise SystemExit('no worker is to start')"


def slurm_run(folder: Path, *, nodes: int = 1, worker: str = NEVER) -> RunDir:
    """A run that has been submitted to Slurm once, and gives up after two failures."""
    run = make_run(folder, worker)
    config = read_json(run.config) or {}
    write_json(run.config, {**config, "launch": {**config["launch"], "max_failures": 2}})
    write_json(run.cluster, ClusterConfig(kind="slurm", nodes=nodes).explicit())
    run.submission(1).path.mkdir(parents=True)
    return run


def slurm_variables(job_run: int = 0, node: int = 0, nodes: int = 1) -> dict[str, str]:
    """The environment of the task on `node`; every node is this machine."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": str(node),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(f"127.0.0.{number + 1}" for number in range(nodes)),
        "SLURMD_NODENAME": f"127.0.0.{node + 1}",
        "SLURM_RESTART_COUNT": str(job_run),
    }


def start_job_run(
    run: RunDir, *, job_run: int = 0, node: int = 0, nodes: int = 1
) -> "subprocess.CompletedProcess[str]":
    """Run the node task until it ends, or until Slurm kills it after a requeue."""
    slurm = FakeSlurm()
    slurm.jobs["7"] = FakeJob(restarts=job_run)
    slurm.install_scontrol(run.path / "bin")
    task = f"from launcher.node.task import NodeTask; print(NodeTask({str(run.path)!r}, '0001')())"
    environment = {**os.environ, **run.code_environment, **slurm_variables(job_run, node, nodes)}
    environment["PATH"] = f"{run.path / 'bin'}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", task], env=environment, capture_output=True, text=True, timeout=60
    )


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [line for line in record.read(run.events) if line["event"] == name]


def test_failing_node_task_is_requeued_and_then_ends_with_93(tmp_path: Path) -> None:
    run = slurm_run(tmp_path / "run")
    (run.submission(1).path / "node-0.log").mkdir()  # a file system that does strange things
    assert start_job_run(run, job_run=0).returncode == -9
    [requeued] = events(run, "requeued")
    assert requeued["failed"]
    assert requeued["cause"].startswith("the node task failed: IsADirectoryError(21, ")
    assert read_json(run.submission(1).outcome) is None
    done = start_job_run(run, job_run=1)
    assert done.returncode == 0, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    outcome = read_json(run.submission(1).outcome)
    assert outcome is not None
    assert outcome["exit_code"] == 93
    assert outcome["cause"].startswith(
        "2 job runs failed without a new checkpoint; the last one: the node task failed: IsADir"
    )


def test_failure_of_another_node_ends_the_job_run(tmp_path: Path) -> None:
    run = slurm_run(tmp_path / "run", nodes=2)
    write_json(run.submission(1).path / "meeting-slurm-7-0.json", {"address": "127.0.0.1", "port": 1})
    (run.submission(1).path / "node-1.log").mkdir()
    done = start_job_run(run, node=1, nodes=2)
    # srun ends nobody for it.
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["{}"]), done.stderr
    # Without the report torchrun would wait for the other node.
    assert start_job_run(run, node=0, nodes=2).returncode == -9
    [requeued] = events(run, "requeued")
    assert requeued["failed"]
    cause = "the workers ended without a result (torchrun: -9); node 127.0.0.2: the node task failed: IsADir"
    assert requeued["cause"].startswith(cause)


def test_bad_node_that_slurm_gives_again_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run(tmp_path / "run")
    for name, value in slurm_variables().items():
        monkeypatch.setenv(name, value)
    job_run = NodeRunner(run, 1).job_run

    def outcome_of_check(attempt: int, bad: str) -> JobOutcome:
        run.attempt(attempt).path.mkdir()
        write_json(run.attempt(attempt).owner, {"job": "slurm-7", "turn": 0})
        record.append(run.bad_nodes, node=bad, reason="its clock", attempt=attempt)
        cause = f"bad nodes: {bad}: its clock"
        write_json(run.attempt(attempt).result, {"exit_code": 75, "cause": cause})
        return job_run.outcome(TorchrunEnd(0, stopped_now=False), was_signalled=False)

    assert outcome_of_check(1, "node2") == job_outcome(75, "bad nodes: node2: its clock", 1)
    assert outcome_of_check(2, "node3") == job_outcome(75, "bad nodes: node3: its clock", 2)
    again = "bad nodes: node2: its clock; Slurm has given the job node2 again despite the exclusion"
    assert outcome_of_check(3, "node2") == job_outcome(1, again, 3)
