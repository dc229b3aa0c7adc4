"""The order in which a save reaches the disk, as the kernel saw it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.run.run_dir import RunDir

CALLS = "write,fsync,rename,renameat,renameat2,openat"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_save_writes_fsyncs_renames_and_fsyncs_the_folder_in_this_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.attempt(1).path.mkdir(parents=True)
    trace = tmp_path / "trace"
    # -y shows the path of every descriptor
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-e", f"trace={CALLS}", "-o", str(trace)]
    program = [sys.executable, "-m", "tests.unit.gpt.saving.support", str(run.path), "1"]
    done = subprocess.run([*command, *program], capture_output=True, text=True, timeout=120, check=False)
    if "ptrace" in done.stderr and done.returncode != 0:
        pytest.skip(f"this machine forbids tracing: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    calls = [line for line in trace.read_text().splitlines() if str(run.path) in line]
    temporary = r"checkpoints/\.tmp-0001-00000001"
    order = [
        rf"write\(\d+<.*{temporary}/rank-00000\.safetensors>",
        rf"fsync\(\d+<.*{temporary}/rank-00000\.safetensors>",
        rf"openat\(.*{temporary}/rank-00000\.safetensors\", O_RDONLY",  # read back
        r"fsync\(\d+<.*/metrics\.jsonl>",
        rf"write\(\d+<.*{temporary}/\.checkpoint\.json\.\d+>",
        rf"fsync\(\d+<.*{temporary}/\.checkpoint\.json\.\d+>",
        rf"rename.*{temporary}/\.checkpoint\.json\.\d+\".*{temporary}/checkpoint\.json\"",
        rf"fsync\(\d+<.*{temporary}>",
        rf"rename.*{temporary}\".*checkpoints/step-00000001\"",
        r"fsync\(\d+<.*/checkpoints>",
    ]
    last_of_each = [max(i for i, call in enumerate(calls) if re.search(step, call)) for step in order]
    assert last_of_each == sorted(last_of_each), "\n".join(calls)
    writes = [i for i, call in enumerate(calls) if re.search(order[0], call)]
    assert writes[-1] < last_of_each[1], "everything is written before it is synced"
