"""Turns of a Slurm job that fail: the node task puts the job back in the queue, and knows when to give up.

Slurm itself is a program that says what a test wants it to, and ends whoever asks for a requeue, as the real
one does; tests/slurm has the real one.
"""

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
from launcher.node.task import _Node
from launcher.runs.store import explicit
from tests.unit.launcher.support import job_outcome, make_run

SCONTROL = """#!/bin/sh
case "$*" in
    *"show job"*) echo "JobId=7 JobState=RUNNING Restarts=$SLURM_RESTART_COUNT ExcNodeList=(null)" ;;
    *requeue*) kill -9 $PPID ;;
esac
"""
NEVER = "raise SystemExit('no worker is to start')"


def slurm_run(folder: Path, *, nodes: int = 1, worker: str = NEVER) -> RunDir:
    """A run that has been submitted to Slurm once, and gives up after two failures."""
    run = make_run(folder, worker)
    config = read_json(run.config) or {}
    write_json(run.config, {**config, "launch": {**config["launch"], "max_failures": 2}})
    write_json(run.cluster, explicit(ClusterConfig(kind="slurm", nodes=nodes)))
    run.submission(1).path.mkdir(parents=True)
    return run


def slurm_variables(turn: int = 0, node: int = 0, nodes: int = 1) -> dict[str, str]:
    """What Slurm tells the task on `node`, which is this machine as every other is."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": str(node),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(f"127.0.0.{number + 1}" for number in range(nodes)),
        "SLURMD_NODENAME": f"127.0.0.{node + 1}",
        "SLURM_RESTART_COUNT": str(turn),
    }


def take_turn(run: RunDir, **place: int) -> "subprocess.CompletedProcess[str]":
    """Run the node task of one turn until it ends or is ended."""
    bin_folder = run.path / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "scontrol").write_text(SCONTROL)
    (bin_folder / "scontrol").chmod(0o755)
    task = f"from launcher.node.task import NodeTask; print(NodeTask({str(run.path)!r}, '0001')())"
    environment = {**os.environ, **run.code_environment, **slurm_variables(**place)}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", task], env=environment, capture_output=True, text=True, timeout=60
    )


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [line for line in record.read(run.events) if line["event"] == name]


def test_a_node_task_that_fails_is_a_failed_turn_and_a_loop_of_them_ends_with_93(tmp_path: Path) -> None:
    run = slurm_run(tmp_path / "run")
    (run.submission(1).path / "node-0.log").mkdir()  # a file system that does strange things
    assert take_turn(run, turn=0).returncode == -9
    [requeued] = events(run, "requeued")
    assert requeued["failed"]
    assert requeued["cause"].startswith("the node task failed: IsADirectoryError(21, ")
    assert read_json(run.submission(1).outcome) is None
    done = take_turn(run, turn=1)
    assert done.returncode == 0, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    outcome = read_json(run.submission(1).outcome)
    assert outcome is not None
    assert outcome["exit_code"] == 93
    assert outcome["cause"].startswith(
        "2 turns of the job failed without a new checkpoint, the last one so: the node task failed: IsADir"
    )


def test_another_node_that_fails_says_so_and_the_first_one_ends_the_turn(tmp_path: Path) -> None:
    run = slurm_run(tmp_path / "run", nodes=2)
    meeting = run.submission(1).path / "meeting-slurm-7-0.json"
    meeting.write_text("{")
    done = take_turn(run, node=1, nodes=2)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "{}"), (
        done.stderr
    )  # srun ends nobody for it
    assert take_turn(run, node=0, nodes=2).returncode == -9  # without it torchrun would wait for the other
    [requeued] = events(run, "requeued")
    assert requeued["failed"]
    cause = "the workers ended without a result (torchrun: -9); node 127.0.0.2: the node task failed: ConfigE"
    assert requeued["cause"].startswith(cause)


def test_a_bad_node_that_slurm_gives_again_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run(tmp_path / "run")
    for name, value in slurm_variables().items():
        monkeypatch.setenv(name, value)
    turn = _Node(run, "0001").turn

    def outcome_of_check(attempt: int, bad: str) -> JobOutcome:
        run.attempt(attempt).path.mkdir()
        write_json(run.attempt(attempt).owner, {"job": "slurm-7", "turn": 0})
        record.append(run.bad_nodes, node=bad, reason="its clock", attempt=attempt)
        cause = f"bad nodes: {bad}: its clock"
        write_json(run.attempt(attempt).result, {"exit_code": 75, "cause": cause})
        return turn.outcome(0, stopped_now=False, was_signalled=False)

    assert outcome_of_check(1, "node2") == job_outcome(75, "bad nodes: node2: its clock", 1)
    assert outcome_of_check(2, "node3") == job_outcome(75, "bad nodes: node3: its clock", 2)
    again = "bad nodes: node2: its clock; Slurm has given the job node2 again, which it was to keep away from"
    assert outcome_of_check(3, "node2") == job_outcome(1, again, 3)
