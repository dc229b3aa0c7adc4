"""Ranks, devices, and agreement between ranks.

The ranks agree on everything else than gradients (stop, save, an error, the count of scored tokens) through a
gloo control group, which needs no device and blocks no kernel.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from data_pipeline.errors import LaunchError, OutlastError
from gpt.distributed.mesh import DATA, SEQUENCE, Mesh
from gpt.model.hardware import ACCELERATORS, GPU, Accelerator
from gpt.model.sequence_parallel import WHOLE_SEQUENCES, SequenceGroup
from gpt.run.environment import WorkerEnvironment
from gpt.run.heartbeat import wait_for_ranks
from gpt.run.host_memory import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of the attempt."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this node
    node: int
    device: torch.device
    control: dist.ProcessGroup
    device_problem: str | None = None  # why this rank has no device although it should have one
    sequence: SequenceGroup = WHOLE_SEQUENCES

    @property
    def mesh(self) -> Mesh:
        """The arrangement of all ranks."""
        return Mesh.over(self.size, **{SEQUENCE: self.sequence.size})

    @property
    def data_rank(self) -> int:
        """The index of this rank's part of each batch; ranks that share sequences have the same one."""
        return self.mesh.coordinates(self.rank)[DATA]

    @property
    def data_size(self) -> int:
        """The number of parts into which the ranks split each batch."""
        return self.mesh.size(DATA)

    @property
    def is_counting(self) -> bool:
        """Whether this rank counts its sequences: of the ranks that share them, only the first does."""
        return self.mesh.is_first_outside(self.rank, DATA)

    def require_device(self) -> None:
        """Raise LaunchError if this rank has no device although it should have one."""
        if self.device_problem is not None:
            raise LaunchError(f"rank {self.rank}: {self.device_problem}")

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0


def join(
    timeout_s: float, sequence: int = 1, environment: WorkerEnvironment | None = None, *, gpu: str = GPU
) -> World:
    """Join the process group that torchrun's environment describes: NCCL on GPUs, gloo without.

    `sequence` ranks share each sequence. `gpu` is the kind of device of a run that asks for GPUs.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    # All ranks must choose the same backend, even when one node has lost its GPUs.
    environment = environment or WorkerEnvironment.read()
    wanted = environment.gpus_per_node
    gpus = ACCELERATORS[gpu]
    has_gpu = gpus.is_available() if wanted is None else wanted > 0
    device = torch.device(gpu, local_rank) if has_gpu else torch.device("cpu")
    problem = _problem_of(gpus, device, wanted or local_rank + 1) if has_gpu else None
    if not has_gpu:
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank, size, timeout)
    backend = gpus.backend if has_gpu and _is_every_device_well(store, size, problem) else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        # NCCL then makes later groups by splitting this one, without more connections.
        device_id=device if backend == "nccl" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    node = environment.node if environment.node is not None else int(os.environ.get("GROUP_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = _sequence_group(Mesh.over(size, **{SEQUENCE: sequence}), rank, timeout)
    return World(rank, size, local_rank, local_size, node, device, control, problem, shared)


def _problem_of(gpus: Accelerator, device: torch.device, needed: int) -> str | None:
    """Why `device` cannot be used, where a node needs `needed` of its kind; otherwise it is made current."""
    if (device.index or 0) >= gpus.count():
        return f"the node has {gpus.count()} GPUs, and the run needs {needed}"
    try:
        gpus.use(device)
    except RuntimeError as error:  # uncorrectable memory errors, or a device that fell off the bus
        return f"{device}: {str(error).splitlines()[0]}"
    return None


def _is_every_device_well(store: Store, size: int, problem: str | None) -> bool:
    """Whether no rank has a `problem` with its device. Collective.

    Asked through the store, before there is a process group: NCCL's needs the devices of all ranks. Without
    one of them the ranks meet over gloo, for the node check to name the node.
    """
    store.add("ranks without a device", int(problem is not None))
    if store.add("ranks with a known device", 1) == size:  # the last one, so that the other sum is complete
        store.set("devices", "well" if store.add("ranks without a device", 0) == 0 else "lost")
    return bool(wait_for_ranks(store.get, "devices") == b"well")


def _sequence_group(mesh: Mesh, rank: int, timeout: timedelta) -> SequenceGroup:
    """The ranks that share their sequences with `rank`. Collective."""
    if mesh.size(SEQUENCE) == 1:
        return WHOLE_SEQUENCES
    groups = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in mesh.groups(SEQUENCE)]
    ranks, processes = next((ranks, processes) for ranks, processes in groups if rank in ranks)
    return SequenceGroup(ranks.index(rank), len(ranks), processes)


def _store(rank: int, size: int, timeout: timedelta) -> Store:
    """The key-value store through which the ranks find each other; each restart uses a fresh one.

    On one node the agent keeps its store over restarts, and torch 2.13 does not separate them: a new worker
    would read the addresses of dead ones and fail to connect. On several nodes rank 0 serves a fresh store
    (launcher.node.torchrun says why).
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = not is_agents and rank == 0
    store = wait_for_ranks(TCPStore, address, port, size, is_master=is_server, timeout=timeout)
    if not is_agents:
        return store
    return PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def from_first(world: World, value: T) -> T:
    """Rank 0's `value`, on every rank."""
    box: list[Any] = [value]
    wait_for_ranks(dist.broadcast_object_list, box, src=0, group=world.control)
    return box[0]  # type: ignore[no-any-return]


def gather(world: World, value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    values: list[Any] = [None] * world.size
    wait_for_ranks(dist.all_gather_object, values, value, group=world.control)
    return values


def agree(world: World, action: Callable[[], T]) -> T:
    """`action()` on every rank; when it raises on one rank, every rank raises.

    Otherwise the other ranks would wait in their next collective until it times out. Only Outlast's own
    errors are agreed on: any other error is a crash, after which the agent restarts the workers.
    """
    error: OutlastError | None = None
    result: T | None = None
    try:
        result = action()
    except OutlastError as caught:
        error = caught
    first = next((e for e in gather(world, error) if e is not None), None)
    if first is not None:
        raise error or first
    return result  # type: ignore[return-value]


def total(world: World, *values: float) -> tuple[float, ...]:
    """Each of `values` summed over the ranks, in fp64."""
    summed = torch.tensor(values, dtype=torch.float64)
    wait_for_ranks(dist.all_reduce, summed, group=world.control)
    return tuple(summed.tolist())


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    wait_for_ranks(dist.barrier, group=world.control)


class PendingGather:
    """A few integers of every rank on their way: started at one step boundary and read at the next."""

    def __init__(self, world: World, *values: int) -> None:
        mine = torch.tensor(values, dtype=torch.int64)
        self._all = [torch.empty_like(mine) for _ in range(world.size)]
        self._work = dist.all_gather(self._all, mine, group=world.control, async_op=True)

    def result(self) -> list[tuple[int, ...]]:
        """The values of each rank, in rank order."""
        assert self._work is not None
        wait_for_ranks(self._work.wait)
        return [tuple(values.tolist()) for values in self._all]
