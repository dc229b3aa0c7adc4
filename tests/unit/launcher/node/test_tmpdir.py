"""The temporary folder of a turn goes with it, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.launcher.support import wait_for

TURN = """
import os, sys, tempfile
from pathlib import Path
held = [open(os.devnull) for _ in range(20)]  # descriptors of two digits, which not every shell takes
from launcher.node.rendezvous import Place
from launcher.node.tmpdir import make_scratch, remove_scratch
folder = make_scratch(Place("slurm-7", 0, 0, 1, "here", "7"))
Path(folder, "torchinductor").mkdir()
print(os.environ["TMPDIR"], flush=True)
sys.stdin.read()
remove_scratch(folder)
"""


def start_turn(home: Path) -> tuple["subprocess.Popen[str]", Path]:
    turn = subprocess.Popen(
        [sys.executable, "-c", TURN],
        env={**os.environ, "TMPDIR": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert turn.stdout is not None
    folder = Path(turn.stdout.readline().strip())
    assert (folder / "torchinductor").is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    return turn, folder


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_nothing_of_it_is_left(tmp_path: Path, number: signal.Signals | None) -> None:
    turn, folder = start_turn(tmp_path)
    assert folder.parent == tmp_path
    if number is not None:
        os.kill(turn.pid, number)
    turn.communicate(timeout=20)
    wait_for(lambda: not list(tmp_path.iterdir()), 10)


def test_the_next_turn_removes_what_one_that_was_killed_with_all_its_processes_left(tmp_path: Path) -> None:
    left, others = tmp_path / "outlast-slurm-7-0-abc", tmp_path / "outlast-slurm-7-1-abc"
    (left / "cache").mkdir(parents=True)
    others.mkdir()  # another node's, where nodes share the folder
    turn, _ = start_turn(tmp_path)
    assert not left.exists()
    assert others.exists()
    turn.communicate(timeout=20)
