"""The address at which the other nodes of a job reach this one."""

import socket
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from gpt.run.records import MeetingPoint
from gpt.run.run_dir import SubmissionDir
from launcher.node.rendezvous import Rendezvous, rendezvous
from launcher.scheduler import slurm_commands
from launcher.scheduler.protocol import NodeIdentity
from launcher.scheduler.registry import scheduler_of
from tests.unit.launcher.fake_slurm import FakeSlurm

NAMES = {"alpha": "127.0.1.1", "beta": "127.0.0.2", "gamma": "10.1.2.3", "delta": "2001:db8::7", "eps": "::1"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine `alpha` with Debian's /etc/hosts, which has no address but the loopback's."""

    def look_up(name: str, _port: object, family: socket.AddressFamily) -> Any:
        address = NAMES.get(name, name if name.startswith("192.") else "")
        if not address or family != (socket.AF_INET6 if ":" in address else socket.AF_INET):
            raise socket.gaierror(f"{name} is not known")
        return [(family, socket.SOCK_STREAM, 6, "", (address, 0))]

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
    with pytest.raises(LaunchError, match="scontrol show node n2"):
        slurm_commands.node_address("n1", ["n2"])
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.2")
    assert slurm_commands.node_address("n1", ["n2"]) == "127.0.0.1"


def test_node_without_ipv4_has_its_ipv6_address() -> None:
    assert slurm_commands.node_address("delta", []) == "2001:db8::7"
    assert slurm_commands.node_address("eps", ["eps"]) == "::1"


def test_node_whose_address_slurm_knows_only_by_an_unknown_name_is_reported(slurm: FakeSlurm) -> None:
    slurm.node_addresses["n1"] = "n1.site"
    with pytest.raises(LaunchError, match=r"^node n1 has no address here: .* NodeAddr, n1\.site, has one"):
        slurm_commands.node_address("n1", [])


def test_nodes_meet_at_an_ipv6_address_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("slurm")
    monkeypatch.setattr(scheduler, "node_address", lambda _identity: "::1")
    identity, submission = NodeIdentity("slurm-7", 0, 1, 2, "eps", "7"), SubmissionDir(tmp_path)
    MeetingPoint(address="2001:db8::7", port=12345).write(submission.meeting_point("slurm-7", 0))
    assert rendezvous(identity, scheduler, submission) == Rendezvous("::1", "[2001:db8::7]:12345")
