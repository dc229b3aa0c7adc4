"""Where nodes meet: the address by which the others reach this one."""

import socket
import subprocess
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from launcher.scheduler import slurm_commands as slurm

NAMES = {"alpha": "127.0.1.1", "beta": "127.0.0.2", "gamma": "10.1.2.3"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine `alpha` whose /etc/hosts is Debian's, and that has no address but the loopback's."""

    def look_up(name: str, *_: object) -> Any:
        if name not in NAMES:
            raise socket.gaierror(f"{name} is not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (NAMES[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_the_address_is_that_of_the_name() -> None:
    assert slurm.node_address("gamma", ["alpha"]) == "10.1.2.3"


def test_a_name_on_the_loopback_gives_the_address_towards_another_node() -> None:
    assert slurm.node_address("alpha", ["beta"]) == "127.0.0.1"  # the kernel's choice for 127.0.0.2


def test_a_name_that_only_slurm_knows_gives_its_node_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(command: list[str], _question: str | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 0, "NodeName=n1 NodeAddr=192.0.2.7 NodeHostName=n1", "")

    monkeypatch.setattr(slurm, "_ask", ask)
    assert slurm.node_address("n1", ["gamma"]) == "192.0.2.7"


def test_a_name_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(
        slurm, "_ask", lambda command, _=None: subprocess.CompletedProcess(command, 0, "", "")
    )
    with pytest.raises(LaunchError, match="neither this machine nor Slurm knows an address of node n2"):
        slurm.node_address("n2", [])


def test_in_a_container_that_knows_no_other_node_the_one_that_srun_runs_on_gives_the_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: NAMES[name])
    monkeypatch.setattr(slurm, "_ask", lambda *_: None)
    with pytest.raises(LaunchError, match="scontrol show node n2"):
        slurm.node_address("n1", ["n2"])
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.2")
    assert slurm.node_address("n1", ["n2"]) == "127.0.0.1"
