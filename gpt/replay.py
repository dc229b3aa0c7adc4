"""Computes steps of a run again, from a checkpoint, and prints what they gave. It writes nothing.

`python -m gpt.replay RUN_DIR STEP LAST`, under torchrun. `outlast replay` compares the result with the
record. RUN_DIR holds the config, the events, and the checkpoint of STEP, or none for step 0. Rank 0 prints
one JSON object a step on standard output.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import CheckpointError, OutlastError
from gpt.config.run import RunConfig
from gpt.distributed.reduction import PendingReduction
from gpt.distributed.world import World, agree, barrier, from_first, join, total
from gpt.distributed.zero.engine import Engine
from gpt.model.gpt import seed_dropout
from gpt.model.hardware import is_cpu
from gpt.optimizer.lr_schedule import learning_rate
from gpt.run.events import Event, read_events
from gpt.run.exit_codes import exit_code_of
from gpt.run.process_control import die_with_parent
from gpt.run.run_dir import RunDir
from gpt.saving.restore import load_newest
from gpt.training.metrics import REDUCTIONS
from gpt.training.numerics import set_rounding
from gpt.training.prefetch import Prefetcher
from gpt.training.setup import build_network, open_reader
from gpt.training.start_plan import BuildPlan, ResumePlan
from gpt.training.step import train_step


def main(path: Path, start: int, last: int) -> None:
    """Compute the steps after `start` up to `last` of the run in `path`. Collective."""
    run_dir = RunDir(path)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    set_rounding(is_deterministic=run.deterministic)
    world = join(run.launch.collective_timeout_s, run.parallel.sequence)
    agree(world, world.require_device)
    build = BuildPlan.of(run, has_checkpoint=start > 0, has_gpu=not is_cpu(world.device))
    manifests = agree(world, lambda: [read_manifest(source) for source, _ in build.sources])
    reader = agree(world, lambda: open_reader(run, build))
    engine = Engine(build_network(run, world, build, _warn), run, world)
    plan = ResumePlan.of(run)
    if start > 0:
        loaded = load_newest(run_dir, engine, world, joint_fingerprint(manifests), is_begun=True)
        if loaded is None or loaded.step != start:
            raise CheckpointError(f"the checkpoint of step {start} is corrupt")
        plan = ResumePlan.of(run, step=start, skipped=loaded.skipped)
    else:
        engine.initial_lr = from_first(world, _initial_rate(run_dir))
    for ranges, step in plan.skips:
        reader.skip(ranges, step)
    batches = Prefetcher(reader, world, run.batch.micro_batch, plan.first, last)
    for step in range(plan.first, last + 1):
        _compute(engine, batches, world, step, plan.last)
    barrier(world)


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _compute(engine: Engine, batches: Prefetcher, world: World, step: int, total_steps: int) -> None:
    """Take one step as the trainer does, and print its numbers."""
    run = engine.run
    loaded = batches.get(step)
    scored = max(1.0, total(world, float(loaded.scored_tokens))[0])
    lr = learning_rate(run.schedule, run.optimizer.peak_lr, total_steps, step, engine.initial_lr)
    if run.model.dropout:
        seed_dropout(run.seed, step, world.rank)
    numbers = train_step(engine, loaded.micro_batches, lr, scored)
    own = {"train/loss": float(numbers["train/loss"].double()), "data/digest": float(loaded.digest)}
    reduced = PendingReduction(world, own, REDUCTIONS).result()
    if world.is_first:
        line = {
            "step": step,
            "data/digest": reduced["data/digest"],
            "train/lr": lr,
            "train/loss": reduced["train/loss"] / scored,
            "train/grad_norm": float(numbers["train/grad_norm"].double()),
        }
        print(json.dumps(line), flush=True)


def _initial_rate(run_dir: RunDir) -> float:
    """Where the warmup of the run started."""
    rates = [event.get("initial_lr", 0.0) for event in read_events(run_dir.events, Event.WARMUP_CHOSEN)]
    return float(rates[-1]) if rates else 0.0


if __name__ == "__main__":
    die_with_parent()
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except OutlastError as error:  # every rank raises it
        if os.environ["RANK"] == "0":
            print(json.dumps({"error": str(error), "exit_code": int(exit_code_of(error))}), flush=True)
    sys.stdout.flush()
    dist.destroy_process_group()
    os._exit(0)  # as gpt.train, which explains why
