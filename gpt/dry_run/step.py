"""One optimizer step of the last rank without the GPU, the other ranks and the data.

It runs build_model, Engine and train_step unchanged, on a fake process group and torch's meta device. Shapes,
the order and size of collectives, memory of tensors and host waits are those of the real step. Values,
overlap, races, the allocator's fragmentation and the memory of CUDA and NCCL are not seen.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.distributed.mesh import SEQUENCE, Mesh
from gpt.distributed.world import World
from gpt.distributed.zero.build import DTYPES, build_model
from gpt.distributed.zero.engine import Engine
from gpt.distributed.zero.fake_accelerator import accelerated, shapes_only
from gpt.dry_run.device import DEVICE, Stream, StreamEvent, used_as_gpu
from gpt.dry_run.kernels import in_shapes
from gpt.dry_run.recorder import Recorder, storage_bytes
from gpt.model.attention import Documents
from gpt.model.sequence_parallel import WHOLE_SEQUENCES, SequenceGroup
from gpt.run.dry_step import DryStep
from gpt.training.metrics import DeferredScalars
from gpt.training.step import ModelInputs, train_step

HOPPER = (9, 0)
_MICRO_BATCHES = 3  # of more, the middle one counts for those that are left out
_STEPS = 3  # the first allocates the optimizer's state; at stage 3 it also learns the order of the weights


def dry_step(
    run: RunConfig, world_size: int, local_size: int, capability: tuple[int, int] = HOPPER
) -> DryStep:
    """What a step of the resolved `run` does on the last of `world_size` ranks.

    `local_size` of them are on each node. Raises ConfigError for offloading, whose host memory would be real.
    """
    for field in ("offload_optimizer", "offload_parameters"):
        if (place := getattr(run.zero, field)) != "none":
            raise ConfigError(
                f"zero.{field} = {place!r}: a dry step has no host memory for the state. Trace the run with "
                f"zero.{field} = 'none'."
            )
    recorder = Recorder()
    waited = recorder.wait
    with contextlib.ExitStack() as around:
        around.enter_context(used_as_gpu(waited, capability, "a GPU of a dry run"))
        world = around.enter_context(_world(run, world_size, local_size))
        around.enter_context(
            accelerated(
                DEVICE,
                partial(Stream, waited),
                partial(StreamEvent, waited),
                partial(waited, "waits for the device"),
            )
        )
        around.enter_context(in_shapes())
        around.enter_context(recorder)
        return _run(run, world, recorder)


def _run(run: RunConfig, world: World, recorder: Recorder) -> DryStep:
    dtype = torch.get_default_dtype()
    if run.zero.stage < 3:  # the network is cast as a whole, which tensors without memory cannot be
        torch.set_default_dtype(DTYPES[run.precision])
    try:
        with world.device:
            model = build_model(run, world, is_resumed=True)
    finally:
        torch.set_default_dtype(dtype)
    engine = Engine(model, run, world)
    recorder.forget(shapes_only(engine))
    activations, begun, forward = 0, [], model.forward

    def watched_forward(*inputs: Any) -> Tensor:
        nonlocal activations
        begun.append(recorder.counts)
        before = recorder.live_bytes
        with recorder.during("forward"):
            loss: Tensor = forward(*inputs)
        activations = max(activations, recorder.live_bytes - before)
        return loss

    model.forward = watched_forward  # type: ignore[method-assign,assignment]
    micro_batches = run.micro_batches(world.size)
    for _ in range(_STEPS if run.zero.stage == 3 else _STEPS - 1):
        inputs = [_inputs(run, world) for _ in range(min(micro_batches, _MICRO_BATCHES))]
        recorder.begin()
        begun.clear()
        with recorder.during("backward and update"):
            numbers = train_step(engine, inputs, 1e-4, float(run.batch.global_batch_tokens))
            DeferredScalars(numbers)
        del inputs, numbers
    if micro_batches > _MICRO_BATCHES:
        recorder.repeat(begun[1], begun[2], micro_batches - _MICRO_BATCHES)
    return DryStep(
        weights=storage_bytes(getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()),
        optimizer=storage_bytes(part.tensor for part in engine.state()),
        kept=recorder.live_bytes,
        activations=activations,
        peak=recorder.peak_bytes,
        peak_phase=recorder.peak_phase,
        kernels=recorder.kernels,
        collectives=recorder.collectives,
        host_waits=recorder.host_waits,
    )


def _inputs(run: RunConfig, world: World) -> ModelInputs:
    """One micro-batch in which every row is one document."""
    rows, context = run.batch.micro_batch, run.model.context
    ids = torch.zeros(rows, context, dtype=torch.long, device=world.device)
    ends = np.arange(1, rows + 1, dtype=np.int32) * context
    return ids, ids, Documents.from_ends(ends, world.device)


@contextlib.contextmanager
def _world(run: RunConfig, size: int, local_size: int) -> Iterator[World]:
    rank, local_rank = size - 1, local_size - 1
    places = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    os.environ.update({**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        sequence = WHOLE_SEQUENCES
        if run.parallel.sequence > 1:
            ranks = Mesh.over(size, **{SEQUENCE: run.parallel.sequence}).groups(SEQUENCE)[-1]
            sequence = SequenceGroup(len(ranks) - 1, len(ranks), dist.new_group(ranks))
        control = dist.group.WORLD
        assert control is not None
        node = rank // local_size
        yield World(rank, size, local_rank, local_size, node, DEVICE, control, sequence=sequence)
    finally:
        dist.destroy_process_group()
