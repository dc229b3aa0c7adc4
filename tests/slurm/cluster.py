"""A real Slurm on this machine: munged, slurmctld and one slurmd per node, from Debian's packages.

All nodes are this host, each under its own name and port. Jobs in `high` preempt those in `low`.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
_CONFIG = """
ClusterName=outlast
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
GresTypes=gpu
SlurmdTimeout=10
KillWait=20
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=3,sched_min_interval=100000,bf_interval=3
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE
PartitionName=harsh Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=30 MaxTime=INFINITE
PartitionName=gone Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=INFINITE
PartitionName=short Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class SlurmCluster:
    """Starts the daemons in `folder`; `stop` ends them and all processes that their jobs have left."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder
        folder.chmod(0o755)  # munge refuses a socket that other users cannot reach
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.temporary_files = folder / "tmp"
        self.temporary_files.mkdir()
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "TMPDIR": str(self.temporary_files),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._hurried: dict[str, float] = {}  # job id → when it was released
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 "
            "RealMemory=4000"
            for name in self.nodes
        ]
        text = _CONFIG.format(host=host, port=free_port(), folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        for name in self.nodes:
            (folder / f"spool-{name}").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        named = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *named])
        wait_for((folder / "munge.socket").exists)
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%n %t", "--Node").stdout.count("idle") >= nodes
        )

    def start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-D"])
        wait_for(lambda: "is UP" in self.run("scontrol", "ping").stdout)

    def stop_controller(self) -> None:
        self._processes.pop("slurmctld").terminate()
        wait_for(lambda: "is UP" not in self.run("scontrol", "ping").stdout)

    def start_node(self, name: str) -> None:
        self._start(name, ["slurmd", "-D", "-N", name])

    def kill_node(self, name: str) -> None:
        """Kill the node's slurmd; its jobs go on until the controller misses it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def run(self, *command: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check)

    def start_at_once(self, job_id: str) -> None:
        """Release a requeued job, which Slurm holds for two minutes.

        It starts two seconds later: within the second of the requeue the nodes refuse its credential.
        """
        if time.monotonic() - self._hurried.get(job_id, -10.0) > 5.0:
            self._hurried[job_id] = time.monotonic()
            self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")

    def field(self, job_id: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def occupy(self, seconds: int = 600, nodes: int = 3) -> str:
        """Submit a job in `high` that needs whole nodes; its id."""
        script = self.folder / "occupy.sh"
        script.write_text(f"#!/bin/sh\nsleep {seconds}\n")
        done = self.run(
            "sbatch",
            "--parsable",
            "--partition=high",
            f"--nodes={nodes}",
            "--exclusive",
            "--time=30",
            "--output=/dev/null",
            str(script),
            check=True,
        )
        return done.stdout.strip()

    def clear(self) -> None:
        """End all jobs, restart missing daemons, and wait until the nodes are free."""
        if "slurmctld" not in self._processes:
            self.start_controller()
        for name in self.nodes:
            if name not in self._processes:
                self.start_node(name)
        self.run("scancel", "--user=root")
        self.run("scancel", "--signal=KILL", "--user=root")
        wait_for(lambda: not self.run("squeue", "--noheader").stdout.strip(), 90)
        wait_for(
            lambda: (
                self.run("sinfo", "--noheader", "--format=%n %t", "--Node").stdout.count("idle")
                >= 3 * len(self.nodes)
            ),
            90,
        )

    def stop(self) -> None:
        self.run("scancel", "--signal=KILL", "--user=root")
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        for pid in processes_naming(str(self.folder)):
            os.kill(pid, signal.SIGKILL)

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain")
        time.sleep(0.1)


def processes_naming(text: str) -> list[int]:
    """Living processes with `text` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
