"""Trains a network for a few steps in one of several ways, and measures the time and the memory of a step.

    torchrun --nproc-per-node=2 tests/benchmarks/step_time.py RUN_CONFIG_JSON WAY

WAY is outlast (at the config's ZeRO stage), ddp (torch's, with fp32 masters), fsdp2 (torch's fully_shard) or
bare (one process, no collectives). All train the same network on the same ids, with AdamW, gradient clipping
and the gradient's norm. Rank 0 prints one JSON line. With OUTLAST_MEMORY=1 the process returns freed memory
at once, so that it holds no more than its tensors do; that costs time.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpt.distributed.world
from gpt.config.run import RunConfig
from gpt.distributed.world import World, join
from gpt.distributed.zero.build import DTYPES, build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents
from gpt.model.gpt import GPT
from gpt.training.step import ModelInputs, train_step

WARM, MEASURED = 3, 12
Step = Callable[[list[ModelInputs], float], float]
"""(micro-batches, scored tokens over all ranks) → the gradient's norm"""


def outlast(run: RunConfig, world: World) -> Step:
    model = build_model(run, world)
    engine = Engine(model, run, world)

    def step(batches: list[ModelInputs], scored: float) -> float:
        return float(train_step(engine, batches, 1e-4, scored)["train/grad_norm"])

    return step


def with_masters(run: RunConfig, world: World, *, is_distributed: bool) -> Step:
    """16-bit weights and gradients and fp32 masters for AdamW, as ZeRO has them, but whole on every rank."""
    dtype = DTYPES[run.precision]
    model = GPT(run.model)
    model.initialize(run.seed)
    model.place(world.device, dtype)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if is_distributed else model
    weights = list(model.parameters())
    masters = [weight.detach().float().clone().requires_grad_() for weight in weights]
    adamw = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[ModelInputs], scored: float) -> float:
        for weight in weights:
            weight.grad = None
        for inputs in batches:
            (network(*inputs) * (world.size / scored)).backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return float(norm)

    return step


def fsdp2(run: RunConfig, world: World) -> Step:
    dtype = DTYPES[run.precision]
    model = GPT(run.model)
    model.initialize(run.seed)
    model.place(world.device, dtype)
    model.float()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[ModelInputs], scored: float) -> float:
        adamw.zero_grad()
        for inputs in batches:
            (model(*inputs) * (world.size / scored)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        full: Tensor = norm.full_tensor()  # type: ignore[attr-defined]
        return float(full)

    return step


def kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(run: RunConfig, way: str) -> None:
    torch.set_num_threads(1)
    if "OUTLAST_MEMORY" in os.environ:
        gpt.distributed.world.keep_freed_memory = lambda: None
    world = join(120)
    if way == "outlast":
        from gpt.distributed.zero.patches import import_deepspeed

        import_deepspeed(world.device)
    before = kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    steps: dict[str, Callable[[], Step]] = {
        "outlast": lambda: outlast(run, world),
        "ddp": lambda: with_masters(run, world, is_distributed=True),
        "bare": lambda: with_masters(run, world, is_distributed=False),
        "fsdp2": lambda: fsdp2(run, world),
    }
    step = steps[way]()
    rows, context = run.batch.micro_batch, run.model.context
    generator = torch.Generator().manual_seed(world.rank)
    ends = torch.arange(1, rows + 1, dtype=torch.int32) * context
    batches: list[ModelInputs] = []
    for _ in range(run.micro_batches(world.size)):
        ids = torch.randint(0, run.model.vocabulary, (rows, context + 1), generator=generator)
        batches.append((ids[:, :-1], ids[:, 1:], Documents.from_ends(ends.numpy())))
    scored = float(run.batch.global_batch_tokens)
    norms = [step(batches, scored) for _ in range(WARM)]
    seconds = []
    for _ in range(MEASURED):
        started = time.perf_counter()
        step(batches, scored)
        seconds.append(time.perf_counter() - started)
    if world.is_first:
        found = {
            "way": way,
            "stage": run.zero.stage,
            "world": world.size,
            "seconds": median(seconds),
            "slowest": max(seconds),
            "norm": norms[0],
            "peak_bytes": 1024 * (kibibytes("VmHWM") - before),
        }
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])
