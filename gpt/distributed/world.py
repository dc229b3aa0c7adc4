"""Ranks, devices, and agreement between ranks.

Everything that ranks must agree on (stop, save, an error, the count of scored tokens) goes through a gloo
control group beside the training collectives, so that it needs no device and blocks no kernel.
"""

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from data_pipeline.errors import OutlastError
from gpt.model.sequence_parallel import WHOLE_SEQUENCES, SequenceGroup, sequence_group
from gpt.run.environment import WorkerEnvironment
from gpt.run.host_memory import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this node
    node: int
    device: torch.device
    control: dist.ProcessGroup
    device_problem: str | None = None  # why this rank has no device, where it should have one
    sequence: SequenceGroup = WHOLE_SEQUENCES

    @property
    def data_rank(self) -> int:
        """Which part of each batch is this rank's; those that share sequences have the same."""
        return self.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        """Into how many parts batches are cut."""
        return self.size // self.sequence.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes shared files."""
        return self.rank == 0


def join(timeout_s: float, sequence: int = 1, environment: WorkerEnvironment | None = None) -> World:
    """Join the process group that torchrun's environment describes: NCCL on GPUs, gloo without.

    `sequence` ranks share each sequence.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    # All ranks must choose the same backend, also where one node has lost its GPUs.
    environment = environment or WorkerEnvironment.read()
    wanted = environment.gpus_per_node
    has_gpu = torch.cuda.is_available() if wanted is None else wanted > 0
    problem = None
    if has_gpu and local_rank >= torch.cuda.device_count():
        problem = f"{torch.cuda.device_count()} GPUs are there, {wanted or local_rank + 1} were asked for"
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu and problem is None:
        torch.cuda.set_device(device)
    if not has_gpu:
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(
        backend, store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    node = environment.node if environment.node is not None else int(os.environ.get("GROUP_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = sequence_group(sequence, timeout)
    return World(rank, size, local_rank, local_size, node, device, control, problem, shared)


def _store(rank: int, size: int, timeout: timedelta) -> Store:
    """The key-value store in which the ranks find each other, another one after each restart.

    On one node the agent keeps one store over restarts, and torch 2.13 no longer separates them: a new
    worker would find the addresses of the dead and fail to connect. Over several nodes rank 0 serves a
    fresh one (launcher.node.torchrun says why).
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(address, port, size, is_master=not is_agents and rank == 0, timeout=timeout)
    if not is_agents:
        return store
    return PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def from_first(world: World, value: T) -> T:
    """Rank 0's `value`, on every rank."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]  # type: ignore[no-any-return]


def gather(world: World, value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def agree(world: World, action: Callable[[], T]) -> T:
    """`action()` on every rank; an error that one rank meets is raised by all.

    Without this a rank that fails leaves the others in their next collective until it times out. Only
    our own errors are agreed upon: any other is a crash, which the agent answers by a restart.
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


@dataclass(frozen=True)
class Tick:
    """What the ranks tell each other at a step boundary; values are summed over the ranks."""

    loss_sum: float = 0.0
    scored_ahead: float = 0.0
    digest: float = 0.0
    stop: float = 0.0
    error: float = 0.0
    save_due: float = 0.0
    save_done: float = 0.0
    save_failed: float = 0.0


class PendingTick:
    """A Tick under way: started at one boundary and read at the next, so that no step waits for it."""

    def __init__(self, world: World, tick: Tick) -> None:
        self._values = torch.tensor(astuple(tick), dtype=torch.float64)
        self._work = dist.all_reduce(self._values, group=world.control, async_op=True)

    def result(self) -> Tick:
        """The sum over the ranks."""
        assert self._work is not None
        self._work.wait()
        return Tick(*self._values.tolist())


class PendingGather:
    """A few integers of every rank under way, like a PendingTick."""

    def __init__(self, world: World, *values: int) -> None:
        mine = torch.tensor(values, dtype=torch.int64)
        self._all = [torch.empty_like(mine) for _ in range(world.size)]
        self._work = dist.all_gather(self._all, mine, group=world.control, async_op=True)

    def result(self) -> list[tuple[int, ...]]:
        """The values of each rank, in rank order."""
        assert self._work is not None
        self._work.wait()
        return [tuple(values.tolist()) for values in self._all]


def total(world: World, *values: float) -> tuple[float, ...]:
    """Each of `values` summed over the ranks, in fp64."""
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed, group=world.control)
    return tuple(summed.tolist())
