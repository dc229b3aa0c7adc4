"""The address at which the other nodes of a job reach this one."""

import socket
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from launcher.scheduler import slurm_commands
from tests.unit.launcher.fake_slurm import FakeSlurm

NAMES = {"alpha": "127.0.1.1", "beta": "127.0.0.2", "gamma": "10.1.2.3"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine `alpha` with Debian's /etc/hosts, which has no address but the loopback's."""

    def look_up(name: str, *_: object) -> Any:
        if name not in NAMES:
            raise socket.gaierror(f"{name} is not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (NAMES[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    fake.install(monkeypatch)
    return fake


def test_address_is_that_of_the_name() -> None:
    assert slurm_commands.node_address("gamma", ["alpha"]) == "10.1.2.3"


def test_name_on_the_loopback_gives_the_address_towards_another_node() -> None:
    assert slurm_commands.node_address("alpha", ["beta"]) == "127.0.0.1"  # the kernel's choice for 127.0.0.2


def test_name_that_only_slurm_knows_gives_its_node_address(slurm: FakeSlurm) -> None:
    slurm.node_addresses["n1"] = "192.0.2.7"
    assert slurm_commands.node_address("n1", ["gamma"]) == "192.0.2.7"


def test_unknown_name_is_reported(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "is_here", lambda: True)
    with pytest.raises(LaunchError, match="neither this machine nor Slurm knows an address of node n2"):
        slurm_commands.node_address("n2", [])
    assert slurm.asked == [["scontrol", "show", "node", "n2"]]


def test_container_without_scontrol_uses_the_route_to_the_node_of_srun(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.is_silent = True
    monkeypatch.setattr(slurm_commands, "is_here", lambda: False)
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: NAMES[name])
    with pytest.raises(LaunchError, match="scontrol show node n2"):
        slurm_commands.node_address("n1", ["n2"])
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.2")
    assert slurm_commands.node_address("n1", ["n2"]) == "127.0.0.1"
