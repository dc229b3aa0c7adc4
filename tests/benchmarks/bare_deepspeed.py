"""A training script as one would write it without Outlast, for one step of the same network on random ids.

    torchrun --nproc-per-node=2 tests/benchmarks/bare_deepspeed.py RUN_CONFIG_JSON OUT

It checks, saves and records nothing. It writes the time (Unix seconds) of the end of the step to OUT.
"""

import os
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.sampling.batch import Batch
from gpt.config.run import RunConfig
from gpt.distributed.zero.build import DTYPES
from gpt.distributed.zero.deepspeed_config import deepspeed_config
from gpt.model.gpt import GPT
from gpt.training.step import model_inputs


def main(config: Path, out: Path) -> None:
    """Train for one step and write the time of its end."""
    run = RunConfig.model_validate_json(config.read_text())
    deepspeed.ops.__compatible_ops__ = {}  # otherwise its shared-memory collectives compile for 40 s
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(run.seed)
    model = GPT(run.model)
    model.initialize(run.seed)
    model.place(torch.device("cpu"), DTYPES[run.precision])
    world = dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optimizer.peak_lr, fused=True)
    settings = deepspeed_config(run, world, has_gpu=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rows, context = run.batch.micro_batch, run.model.context
    for _ in range(run.micro_batches(world)):
        batch = Batch(
            tokens=np.random.default_rng(0).integers(0, run.model.vocabulary, (rows, context + 1)),
            document_ends=np.arange(1, rows + 1, dtype=np.int32) * np.int32(context),
            scored=np.ones((rows, context), bool),
            sequence_numbers=np.arange(rows),
        )
        loss = engine(*model_inputs(batch, torch.device("cpu"))) / (rows * context)
        engine.backward(loss)
        engine.step()
    if dist.get_rank() == 0:
        out.write_text(str(time.time()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
