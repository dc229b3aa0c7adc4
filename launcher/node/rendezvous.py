"""Where the nodes of a job run meet, and how they tell each other about a failure.

All of it goes through files in the submission's folder, which all nodes share. The names of the files hold
the job and its job run: a requeued job keeps its id, and starts a new job run each time.
"""

import socket
import time
from dataclasses import dataclass

from data_pipeline.errors import LaunchError
from gpt.run.json_file import is_listed
from gpt.run.records import MeetingPoint, NodeFailure
from gpt.run.run_dir import SubmissionDir
from launcher.scheduler.protocol import NodeIdentity, Scheduler

_PORTS = range(12_000, 30_000)  # below the kernel's ephemeral ports, so that no client holds one by chance
_TIMEOUT_S = 300.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Rendezvous:
    """This node's own address, and ADDRESS:PORT at which torchrun meets on the first node."""

    address: str
    endpoint: str


def rendezvous(identity: NodeIdentity, scheduler: Scheduler, submission: SubmissionDir) -> Rendezvous:
    """Where the nodes of this job run meet; a single node uses any free port.

    The first node starts from a port derived from the job id, takes the next free one, and writes it into
    `submission`. Raises LaunchError when it does not.
    """
    if identity.nodes == 1:
        return Rendezvous("127.0.0.1", "127.0.0.1:0")
    address = scheduler.node_address(identity)
    path = submission.meeting_point(identity.job, identity.job_run)
    if identity.is_first:
        MeetingPoint(address=address, port=_free_port(address, _first_port(identity.job_id))).write(path)
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := MeetingPoint.read_unless_garbled(path) if is_listed(path) else None) is None:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{identity.name} waited {_TIMEOUT_S:.0f} s for the first node's {path.name}: that node did "
                "not start, or the run directory is not on a file system that all nodes share."
            )
        time.sleep(_POLL_S)
    host = f"[{found.address}]" if ":" in found.address else found.address  # an IPv6 address has colons
    return Rendezvous(address, f"{host}:{found.port}")


def report_failure(identity: NodeIdentity, submission: SubmissionDir, cause: str) -> None:
    """Tell the other nodes of this job run why this one has failed."""
    path = submission.node_failure(identity.job, identity.job_run, identity.node)
    NodeFailure(cause=f"node {identity.name}: {cause}").write(path)


def reported_failures(identity: NodeIdentity, submission: SubmissionDir) -> list[str]:
    """The causes that the failed nodes of this job run have reported."""
    pattern = submission.node_failure(identity.job, identity.job_run, "*").name
    found = (NodeFailure.read_unless_garbled(path) for path in sorted(submission.path.glob(pattern)))
    return [failure.cause for failure in found if failure is not None]


def _first_port(job_id: str) -> int:
    """A port for the job, so that two jobs on one machine rarely try the same."""
    digits = "".join(character for character in job_id if character.isdigit())
    return _PORTS[int(digits or "0") * 7 % len(_PORTS)]


def _free_port(address: str, wanted: int) -> int:
    for port in (*range(wanted, _PORTS.stop), *range(_PORTS.start, wanted)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return int(port)
    raise LaunchError(f"{address} has no free port between {_PORTS.start} and {_PORTS.stop}")
