"""Slurm for the launcher's unit tests: it answers Slurm's commands from a state that the test sets.

tests/slurm has the real one.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.scheduler import slurm_commands


@dataclass
class FakeJob:
    """What Slurm knows about one job."""

    state: str = "RUNNING"
    reason: str = "None"
    nodes: str = "node1"
    restarts: int = 0
    excluded: str = "(null)"
    preempted: str = "None"

    def line(self, job_id: str) -> str:
        """The answer of `scontrol --oneliner show job`."""
        return (
            f"JobId={job_id} JobName=x JobState={self.state} Reason={self.reason} Restarts={self.restarts} "
            f"PreemptTime={self.preempted} NodeList={self.nodes} ExcNodeList={self.excluded}"
        )


class FakeSlurm:
    """Its controller and its accounting. `install` puts it in the place of Slurm's commands."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}  # this user's
        self.jobs_of_others: dict[str, FakeJob] = {}
        self.accounting: dict[str, str] = {}  # job id → state
        self.node_addresses: dict[str, str] = {}
        self.qos: dict[str, str] = {}  # name → the line of sacctmgr
        self.requeue_errors: list[str] = []  # one for each request, the last one for all further ones
        self.is_silent = False
        self.asked: list[list[str]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer the commands of this process."""
        monkeypatch.setattr(slurm_commands, "ask", self.ask)

    def install_scontrol(self, folder: Path) -> Path:
        """Write an executable scontrol for other processes, with the jobs as they are now.

        It appends every other command to the file that is returned, and kills its caller at once, as Slurm
        does after a requeue.
        """
        folder.mkdir(exist_ok=True)
        shows = "".join(
            f'    *"show job {job_id}"*) echo "{job.line(job_id)}" ;;\n' for job_id, job in self.jobs.items()
        )
        asked = folder / "asked"
        script = f'#!/bin/sh\ncase "$*" in\n{shows}    *) echo "$@" >> {asked}; kill -9 $PPID ;;\nesac\n'
        (folder / "scontrol").write_text(script)
        (folder / "scontrol").chmod(0o755)
        return asked

    def ask(self, command: list[str], _stdin: str | None = None) -> "subprocess.CompletedProcess[str] | None":
        """The answer to one command; None while Slurm does not answer."""
        self.asked.append(command)
        self.before(command)
        if self.is_silent:
            return None
        match [word for word in command if word != "--oneliner"]:
            case ["squeue", *options]:
                return _done(command, self._squeue(options))
            case ["scontrol", "show", "job", job_id]:
                job = (self.jobs | self.jobs_of_others).get(job_id)
                return (
                    _done(command, job.line(job_id)) if job else _failed(command, "Invalid job id specified")
                )
            case ["scontrol", "show", "hostnames", names]:
                return _done(command, names.replace(",", "\n"))
            case ["scontrol", "show", "node", node]:
                address = self.node_addresses.get(node)
                return _done(
                    command, f"NodeName={node} NodeAddr={address} NodeHostName={node}" if address else ""
                )
            case ["scontrol", "requeue", _]:
                errors = self.requeue_errors
                error = (errors.pop(0) if len(errors) > 1 else errors[0]) if errors else ""
                return _failed(command, error) if error else _done(command)
            case ["sacct", *options]:
                wanted = _ids(options)
                rows = [f"{job_id}|{state}" for job_id, state in self.accounting.items() if job_id in wanted]
                return _done(command, "\n".join(rows))
            case ["sacctmgr", *_, "qos", name, _]:
                return _done(command, self.qos.get(name, ""))
            case _:
                return _done(command)

    def before(self, command: list[str]) -> None:
        """What happens just before the answer; a test may override it."""

    def _squeue(self, options: list[str]) -> str:
        jobs = self.jobs
        if "--me" not in options:
            wanted = _ids(options)
            jobs = {job_id: job for job_id, job in (jobs | self.jobs_of_others).items() if job_id in wanted}
        return "\n".join(f"{job_id}|{job.state}|{job.reason}|{job.nodes}" for job_id, job in jobs.items())


def has_srun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an srun on the PATH; submitit looks for one before it writes a batch script."""
    (folder / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    assert shutil.which("srun") is not None


def _ids(options: list[str]) -> list[str]:
    return next((word.removeprefix("--jobs=").split(",") for word in options if "--jobs=" in word), [])


def _done(command: list[str], answer: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess(command, 0, f"{answer}\n" if answer else "", "")


def _failed(command: list[str], error: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess(command, 1, "", error)
