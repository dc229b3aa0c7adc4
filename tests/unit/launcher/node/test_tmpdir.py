"""The temporary folder of a job run is removed with it, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.launcher.support import wait_for

JOB_RUN = """
import os, sys, tempfile
from pathlib import Path
held = [open(os.devnull) for _ in range(20)]  # file descriptors of two digits, which not every shell accepts
from launcher.scheduler.protocol import NodeIdentity
from launcher.node.tmpdir import make_tmpdir, remove_tmpdir
folder = make_tmpdir(NodeIdentity("slurm-7", 0, 0, 1, "here", "7"))
Path(folder, "torchinductor").mkdir()
print(os.environ["TMPDIR"], flush=True)
sys.stdin.read()
remove_tmpdir(folder)
"""


def start_job_run(home: Path) -> tuple["subprocess.Popen[str]", Path]:
    job_run = subprocess.Popen(
        [sys.executable, "-c", JOB_RUN],
        env={**os.environ, "TMPDIR": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job_run.stdout is not None
    folder = Path(job_run.stdout.readline().strip())
    assert (folder / "torchinductor").is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    return job_run, folder


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_folder_is_removed_when_the_task_ends_or_is_killed(
    tmp_path: Path, number: signal.Signals | None
) -> None:
    job_run, folder = start_job_run(tmp_path)
    assert folder.parent == tmp_path
    if number is not None:
        os.kill(job_run.pid, number)
    job_run.communicate(timeout=20)
    wait_for(lambda: not list(tmp_path.iterdir()), 10)


def test_next_job_run_removes_the_folder_of_one_that_was_killed_with_all_its_processes(
    tmp_path: Path,
) -> None:
    left, others = tmp_path / "outlast-slurm-7-0-abc", tmp_path / "outlast-slurm-7-1-abc"
    (left / "cache").mkdir(parents=True)
    others.mkdir()  # another node's, where nodes share the folder
    job_run, _ = start_job_run(tmp_path)
    assert not left.exists()
    assert others.exists()
    job_run.communicate(timeout=20)
