"""Named numbers reduced over the ranks by one asynchronous collective."""

from collections.abc import Mapping
from enum import StrEnum

import torch
import torch.distributed as dist

from gpt.distributed.world import World
from gpt.run.heartbeat import wait_for_ranks


class Reduction(StrEnum):
    """How the values of all ranks become one."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"


class PendingReduction:
    """A reduction under way: it starts at one step boundary and is read at the next, so that no step waits.

    One all-reduce in fp64 sums all numbers. A maximum takes one slot for each rank, in which the other ranks
    have 0, so that the sum keeps every rank's value exactly.
    """

    def __init__(
        self, world: World, numbers: Mapping[str, float], reductions: Mapping[str, Reduction]
    ) -> None:
        self._world_size = world.size
        self._reductions = {name: reductions[name] for name in numbers}
        slots: list[float] = []
        for name, value in numbers.items():
            if reductions[name] is Reduction.MAX:
                slots += [value if rank == world.rank else 0.0 for rank in range(world.size)]
            else:
                slots.append(value)
        self._slots = torch.tensor(slots, dtype=torch.float64)
        self._work = dist.all_reduce(self._slots, group=world.control, async_op=True)

    def result(self) -> dict[str, float]:
        """The reduced numbers by name, once every rank has contributed."""
        assert self._work is not None
        wait_for_ranks(self._work.wait)
        found, start = {}, 0
        for name, reduction in self._reductions.items():
            end = start + (self._world_size if reduction is Reduction.MAX else 1)
            values = self._slots[start:end]
            found[name] = float(values.max())
            if reduction is Reduction.MEAN:
                found[name] /= self._world_size
            start = end
        return found
