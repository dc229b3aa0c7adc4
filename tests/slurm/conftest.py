"""Runs on a real Slurm, submitted with the command line and watched through their run directories."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from tests.distributed.conftest import Run, make_run
from tests.distributed.data import small_data_set
from tests.paths import ROOT
from tests.slurm.cluster import SlurmCluster, missing, processes_naming, wait_for
from tests.toml_text import toml_text

STEPS = 800
# Shared by every run of these tests, so that one uninterrupted run is the reference for all.
FIELDS: dict[str, Any] = {
    "zero__stage": 2,
    "schedule__total_steps": STEPS,
    "checkpoint__every_steps": 50,
    "evaluation__every_steps": 200,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if "tests/slurm/" in item.path.as_posix():
            item.add_marker(pytest.mark.slurm)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data_set(tmp_path_factory.mktemp("data") / "kjv")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> list[float]:
    """The losses of an uninterrupted run on two processes."""
    run = make_run(tmp_path_factory.mktemp("reference") / "run", data_dir, **FIELDS)
    assert run.train(processes=2)["exit_code"] == 0
    return run.losses()


@dataclass
class SlurmRun(Run):
    """A run and its job."""

    cluster: SlurmCluster
    folder: Path

    def outlast(self, *arguments: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run an `outlast` command as on the login node."""
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        return subprocess.run(
            [sys.executable, "-c", "from launcher.cli import main; main()", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def cluster_file(self, **fields: Any) -> Path:
        path = self.folder / f"cluster-{len(list(self.folder.glob('cluster-*')))}.toml"
        table = {"kind": "slurm", "nodes": 2, "partition": "low", "time_limit": "00:30:00", **fields}
        path.write_text(toml_text(table))
        return path

    def launch(self, *options: str, **fields: Any) -> None:
        """`outlast launch` on a cluster with `fields`; the run config exists already."""
        config = self.folder / "run.toml"
        done = self.outlast(
            "launch",
            str(config),
            "--cluster",
            str(self.cluster_file(**fields)),
            "--run-dir",
            str(self.dir.path),
            *options,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(self.dir.path)

    @property
    def job_id(self) -> str:
        job = read_json(self.dir.job)
        assert job is not None
        return str(job["job_id"])

    def outcome(self) -> dict[str, Any] | None:
        newest = max(self.dir.submissions.glob("[0-9]*"))
        return read_json(newest / "outcome.json")

    def wait_for_end(self, timeout_s: float = 240) -> dict[str, Any]:
        """Wait until the job has ended, starting it at once after each requeue; its outcome."""
        deadline = time.monotonic() + timeout_s
        while (outcome := self.outcome()) is None:
            assert time.monotonic() < deadline, f"waited {timeout_s} s\n{self.logs()}"
            self.hurry()
            time.sleep(0.3)
        return outcome

    def hurry(self) -> None:
        if "BeginTime" in self.cluster.field(self.job_id, "Reason"):
            self.cluster.start_at_once(self.job_id)

    def wait_for_job_run(self, job_run: int, timeout_s: float = 120) -> None:
        """Return once the job has started its job run number `job_run`."""
        deadline = time.monotonic() + timeout_s
        while not any(line["turn"] >= job_run for line in self.events("turn_started")):
            assert time.monotonic() < deadline, f"waited {timeout_s} s\n{self.logs()}"
            self.hurry()
            time.sleep(0.3)

    def preempt(self) -> None:
        """Let a job in `high` take the nodes, and free them once this job has been preempted."""
        restarts = int(self.cluster.field(self.job_id, "Restarts"))
        intruder = self.cluster.occupy()
        self.wait(lambda: int(self.cluster.field(self.job_id, "Restarts") or restarts) > restarts, 90)
        self.cluster.run("scancel", intruder)
        self.wait_for_job_run(restarts + 1)

    def status(self) -> dict[str, Any]:
        import json

        done = self.outlast("status", str(self.dir.path), "--json")
        assert done.returncode == 0, done.stderr
        row: dict[str, Any] = json.loads(done.stdout)[0]
        return row

    def logs(self) -> str:
        files = [
            *self.dir.submissions.glob("*/*.log"),
            *self.dir.submissions.glob("*/*.out"),
            *self.dir.submissions.glob("*/*.err"),
            self.dir.events,
        ]
        files += sorted(self.dir.attempts.glob("*/*/*.log"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def assert_nothing_is_left(self) -> None:
        """Once Slurm has cleaned up, no process of the run is alive, and no temporary folder is left."""
        wait_for(lambda: not processes_naming(str(self.dir.path)), 30)
        wait_for(lambda: not list(self.cluster.temporary_files.glob("outlast-*")), 30)


@pytest.fixture
def new_slurm_run(tmp_path: Path, data_dir: Path, cluster: SlurmCluster) -> Iterator[Callable[..., SlurmRun]]:
    """Creates runs that are not launched yet; afterwards ends their jobs and restores the cluster."""
    made: list[SlurmRun] = []

    def make(**overrides: Any) -> SlurmRun:
        folder = tmp_path / f"{len(made)}"
        folder.mkdir()
        draft = make_run(folder / "draft", data_dir, **{**FIELDS, **overrides})
        tables = read_json(draft.dir.config) or {}
        (folder / "run.toml").write_text(toml_text(tables))
        made.append(SlurmRun(RunDir(folder / "run"), cluster, folder))
        return made[-1]

    yield make
    cluster.clear()
    for run in made:
        run.assert_nothing_is_left()


def node_task(run: SlurmRun, node: int) -> int:
    """The process id of the node task on `node`."""
    array, _, task = run.job_id.partition("_")
    wanted = (
        {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={array}"}
    )
    wanted.add(f"SLURM_NODEID={node}")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            variables = set((entry / "environ").read_text(errors="replace").split("\0"))
        except OSError:
            continue
        if b"submitit.core._submit" in words and not words.startswith(b"srun") and wanted <= variables:
            return int(entry.name)
    raise AssertionError("no node task")
