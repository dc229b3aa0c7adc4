"""Run from test_zero_contract.py: counts how often a step makes the host wait for a number on the device.

Nothing waits on a CPU, but the same operation runs there: `float(tensor)`, `bool(tensor)` and `.item()` all
become `_local_scalar_dense`.
"""

import json
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config.run import RunConfig
from gpt.distributed.world import join
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents
from gpt.training.metrics import DeferredScalars
from gpt.training.step import train_step


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


world = join(60)
for text in sys.argv[1:]:
    run = RunConfig.model_validate(json.loads(text))
    model = build_model(run, world)
    engine = Engine(model, run, world)
    tokens = torch.randint(0, run.model.vocabulary, (run.batch.micro_batch, run.model.context + 1))
    ends = torch.arange(1, run.batch.micro_batch + 1, dtype=torch.int32) * run.model.context
    inputs = (tokens[:, :-1], tokens[:, 1:], Documents.from_ends(ends.numpy()))
    batch = [inputs] * run.micro_batches(world.size)
    for _ in range(3):  # stage 3 needs some steps to learn in which order weights are used
        train_step(engine, batch, 1e-3, scored_tokens=128.0)
    with Waits() as waits:
        DeferredScalars(train_step(engine, batch, 1e-3, scored_tokens=128.0))  # as the loop does
    print("waits", waits.count, flush=True)
