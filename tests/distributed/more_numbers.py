"""The worker with two more numbers in each step, added where a step's numbers are computed.

It also writes down how many asynchronous all-reduces the loop started.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.distributed.reduction import Reduction
from gpt.distributed.zero.engine import Engine
from gpt.train import STOP, main
from gpt.training import metrics

step, all_reduce = Engine.step, dist.all_reduce
started: list[int] = []


def step_with_more(self: Engine, lr: float) -> dict[str, Tensor]:
    numbers = step(self, lr)
    if numbers:
        numbers["train/twice_grad_norm"] = 2 * numbers["train/grad_norm"]  # the same on every rank
        numbers["train/highest_rank"] = torch.tensor(float(self.world.rank))
    return numbers


def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("async_op"):
        started.append(len(tensor))
    return all_reduce(tensor, *args, **kwargs)


Engine.step = step_with_more  # type: ignore[method-assign]
metrics.REDUCTIONS["train/highest_rank"] = Reduction.MAX  # type: ignore[index]
dist.all_reduce = counted
STOP.install()
main(Path(sys.argv[1]))
Path(sys.argv[1], f"started-{os.environ['RANK']}").write_text(str(len(started)))
sys.stdout.flush()
os._exit(0)
