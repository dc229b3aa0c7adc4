"""Named numbers reduced over three real processes, by one collective."""

import math
import multiprocessing
import os
from pathlib import Path

import torch.distributed as dist

from gpt.distributed.reduction import PendingReduction, Reduction
from tests.unit.gpt.saving.support import join

REDUCTIONS = {
    "count": Reduction.SUM,
    "load": Reduction.MEAN,
    "peak": Reduction.MAX,
    "low": Reduction.MAX,
    "broken": Reduction.MAX,
}


def reduce_on(meeting: Path, rank: int) -> None:
    world = join(meeting, rank, 3)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(kwargs) or all_reduce(*args, **kwargs)
    numbers = {
        "peak": 0.1 + rank,  # not exact in binary, and yet returned as it was
        "count": float(rank),
        "low": -math.inf if rank else -3.5,
        "load": 4.0 * rank,
        "broken": math.nan if rank == 1 else 1.0,
    }
    found = PendingReduction(world, numbers, REDUCTIONS).result()
    broken = found.pop("broken")
    assert math.isnan(broken)
    assert found == {"peak": 2.1, "count": 3.0, "low": -3.5, "load": 4.0}
    assert PendingReduction(world, {"count": 1.0}, REDUCTIONS).result() == {"count": 3.0}
    assert [call["async_op"] for call in calls] == [True, True]
    dist.barrier(group=world.control)
    dist.destroy_process_group()
    os._exit(0)


def test_sum_mean_and_max_share_one_collective(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # it imports torch once for all
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    ranks = [context.Process(target=reduce_on, args=(tmp_path / "meeting", rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
