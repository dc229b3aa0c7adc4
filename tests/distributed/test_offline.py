"""A run needs no network: it works in a network namespace of its own, without any other host."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from tests.distributed.conftest import Run, make_run
from tests.paths import ROOT
from tests.toml_text import toml_text

# Inside, first bring up the loopback interface, and then run the command that users type.
PROGRAM = """
from tests.distributed.test_offline import raise_loopback
raise_loopback()
from launcher.cli import main
main()
"""


def raise_loopback() -> None:
    """Bring up `lo` in this network namespace: SIOCSIFFLAGS with IFF_UP (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x1))


def may_isolate() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_isolate(), reason="no right to make a network namespace here (unshare --net)")
def test_run_needs_no_network(tmp_path: Path, data_dir: Path) -> None:
    draft = make_run(tmp_path / "draft", data_dir, tracking__enabled=True)
    (draft.dir.path / "config.json").rename(tmp_path / "run.json")
    tables = read_json(tmp_path / "run.json") or {}
    (tmp_path / "run.toml").write_text(toml_text(tables))
    command = [sys.executable, "-c", PROGRAM, "launch", "run.toml", "--run-dir", "run"]
    done = subprocess.run(
        ["unshare", "--net", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    run = Run(RunDir(tmp_path / "run"))
    assert len(run.losses()) == 8
    # The command does not wait for the tracker, which sends the rest afterwards.
    run.wait(lambda: (read_json(run.dir.tracking) or {}).get("sent_step") == 8)
