"""Where a node task stands in its job: which node it is, which turn of the job, and where the nodes meet.

A job that is put back in the queue keeps its id; each time it starts again is a *turn*.
"""

import os
import socket
import time
from dataclasses import dataclass

from data_pipeline.errors import LaunchError
from gpt.run.json_file import is_listed
from gpt.run.records import MeetingPoint, NodeFailure
from gpt.run.run_dir import SubmissionDir
from launcher.cluster import ClusterConfig
from launcher.scheduler import slurm_commands as slurm

_PORTS = range(12_000, 30_000)  # below the kernel's ephemeral ports, so that no client holds one by chance
_MEETING_PATIENCE_S = 300.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Place:
    """One node of one turn of a job. `name` is what the scheduler calls the machine."""

    job: str
    turn: int
    node: int
    nodes: int
    name: str
    job_id: str | None = None  # Slurm's; of a task of an array ARRAY_TASK, or scontrol would mean them all

    @property
    def is_first(self) -> bool:
        """Whether this node task speaks for the job."""
        return self.node == 0


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a turn meet: this node's own address, and ADDRESS:PORT of the first node."""

    address: str
    endpoint: str


def find_place(cluster: ClusterConfig) -> Place:
    """This node task's place, from the scheduler's environment. Raises LaunchError outside a job."""
    if cluster.kind == "local":
        job = os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))
        return Place(f"local-{job}", 0, 0, 1, socket.gethostname())
    try:
        node, nodes, job_id, name = (
            os.environ[key] for key in ("SLURM_NODEID", "SLURM_NNODES", "SLURM_JOB_ID", "SLURMD_NODENAME")
        )
    except KeyError as error:
        raise LaunchError(f"not inside a Slurm job: {error} is not set") from None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array is not None and task is not None:
        job_id = f"{array}_{task}"
    turn = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Place(f"slurm-{job_id}", turn, int(node), int(nodes), name, job_id)


def meet(place: Place, submission: SubmissionDir) -> Meeting:
    """Where the nodes of this turn rendezvous; one node alone takes any free port.

    The first node starts from a port derived from the job id, takes the next one that is free, and says
    in `submission`, which all nodes share, which it is. Raises LaunchError when it says nothing.
    """
    if place.nodes == 1:
        return Meeting("127.0.0.1", "127.0.0.1:0")
    address = slurm.node_address(place.name, [name for name in _nodes_of_job() if name != place.name])
    path = submission.meeting_point(place.job, place.turn)
    if place.is_first:
        port = _free_port(address, _PORTS[(int((place.job_id or "0").replace("_", "")) * 7) % len(_PORTS)])
        MeetingPoint(address=address, port=port).write(path)
    deadline = time.monotonic() + _MEETING_PATIENCE_S
    while (found := MeetingPoint.read(path) if is_listed(path) else None) is None:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{place.name} waited {_MEETING_PATIENCE_S:.0f} s for the first node's {path.name}: it did "
                "not start, or the run directory is not on a file system that all nodes share."
            )
        time.sleep(_POLL_S)
    return Meeting(address, f"{found.address}:{found.port}")


def _nodes_of_job() -> list[str]:
    from submitit.slurm.slurm import SlurmJobEnvironment

    return SlurmJobEnvironment().hostnames  # without a question to Slurm: a container may not have scontrol


def report_failure(place: Place, submission: SubmissionDir, cause: str) -> None:
    """Tell the other nodes of this turn that this one has failed, and of what."""
    path = submission.node_failure(place.job, place.turn, place.node)
    NodeFailure(cause=f"node {place.name}: {cause}").write(path)


def failures(place: Place, submission: SubmissionDir) -> list[str]:
    """What the nodes of this turn that have failed said."""
    pattern = submission.node_failure(place.job, place.turn, "*").name
    found = (NodeFailure.read(path) for path in sorted(submission.path.glob(pattern)))
    return [failure.cause for failure in found if failure is not None]


def _free_port(address: str, wanted: int) -> int:
    for port in (*range(wanted, _PORTS.stop), *range(_PORTS.start, wanted)):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return int(port)
    raise LaunchError(f"{address} has no free port between {_PORTS.start} and {_PORTS.stop}")
