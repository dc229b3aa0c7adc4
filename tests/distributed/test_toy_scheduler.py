"""A third scheduler is one new file and one line: a real training under it, with a preemption."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from tests.distributed.conftest import Run
from tests.paths import ROOT
from tests.toml_text import toml_text

STEPS = 300
LAST_LINE = '    "slurm": "launcher.scheduler.slurm",\n'
NEW_LINE = '    "toy": "launcher.scheduler.toy",\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Our packages with the toy scheduler added."""
    folder = tmp_path / "checkout"
    for package in ("launcher", "gpt", "data_pipeline", "cluster_configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("toy_scheduler.py"), folder / "launcher" / "scheduler" / "toy.py")
    registry = folder / "launcher" / "cluster.py"
    text = registry.read_text()
    assert text.count(LAST_LINE) == 1
    registry.write_text(text.replace(LAST_LINE, LAST_LINE + NEW_LINE))
    return folder


def test_two_processes_train_under_an_added_scheduler_and_survive_a_preemption(
    checkout: Path, tmp_path: Path, new_run: Callable[..., Run]
) -> None:
    draft = new_run(schedule__total_steps=STEPS, checkpoint__every_steps=50, evaluation__every_steps=STEPS)
    (tmp_path / "run.toml").write_text(toml_text(read_json(draft.dir.config) or {}))
    (tmp_path / "toy.toml").write_text('kind = "toy"\nprocesses_per_node = 2\n')
    queue = tmp_path / "queue"
    queue.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "TOY_QUEUE": str(queue)}

    def outlast(*arguments: object) -> str:
        command = [sys.executable, "-c", "from launcher.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status() -> dict[str, Any]:
        row: dict[str, Any] = json.loads(outlast("status", run.dir.path, "--json"))[0]
        return row

    run = Run(RunDir(tmp_path / "run"))
    outlast("launch", tmp_path / "run.toml", "--cluster", tmp_path / "toy.toml", "--run-dir", run.dir.path)
    job = read_json(run.dir.job) or {}
    assert (job["executor"], job["job_id"]) == ("toy", "job1")
    run.wait_for_step(20)
    assert status()["state"] == "running"
    os.kill(int((queue / "job1" / "task-pid").read_text()), signal.SIGTERM)
    outcome = run.dir.submission(1).outcome
    run.wait(outcome.exists, 180)
    assert (read_json(outcome) or {})["exit_code"] == 0
    assert [line["turn"] for line in run.events("turn_started")] == [0, 1]
    [requeued] = run.events("requeued")
    assert (requeued["job"], requeued["failed"]) == ("toy-job1", False)
    assert "(SIGTERM); everything is saved" in requeued["cause"]
    assert len(run.losses()) == STEPS
    assert status()["state"] == "finished"
