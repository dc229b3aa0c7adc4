"""What a run will need: parameters, memory a rank, steps, disk. Pure: config in, numbers out.

Time rests on an assumed share of the accelerator's peak (MFU), memory on launcher/preflight/memory.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.sampling.batches import windows_in
from data_pipeline.sampling.mixture import Mixture
from data_pipeline.sampling.skip_list import SkipList
from gpt.config.run import RunConfig
from gpt.model.flops import PEAK_FLOPS_PER_SECOND, flops_per_token, parameter_count
from gpt.run.host_memory import LARGEST_SHARE
from launcher.cluster import ACCELERATOR_MEMORY_GIB, ClusterConfig
from launcher.preflight.memory import Memory, largest_micro_batch, memory, state_bytes
from launcher.scheduler.registry import scheduler_of
from launcher.units import size

_GIB = 2**30
# The rest is the CUDA context's and NCCL's, one to two GiB, and lies between the allocator's blocks.
USABLE_FRACTION = 0.92
# Of well-tuned runs: the GPU hours that Llama 2 reports (arXiv:2307.09288, table 2) come to 0.42 to 0.46.
ASSUMED_MFU = 0.4
_PROCESS_BYTES = 1 << 29  # Python, torch and DeepSpeed before anything is trained: 358 MiB on a CPU


@dataclass(frozen=True)
class Share:
    """What the run reads of one source, exactly."""

    path: str
    sequences: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class Plan:
    """The needs of one run on one cluster."""

    parameters: int
    world_size: int
    micro_batches: int
    steps: int
    tokens: int
    epochs: float | None
    sources: tuple[Share, ...]
    flops: float
    memory: Memory
    largest_micro_batch: int | None
    assumed_mfu: float
    gpu_hours: float | None
    days: float | None
    checkpoint_bytes: int
    host_copy_bytes: int
    disk_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def plan(
    config: RunConfig,
    cluster: ClusterConfig,
    train_tokens: Sequence[int] | None,
    mfu: float = ASSUMED_MFU,
) -> Plan:
    """The needs of a resolved `config` on `cluster`; `train_tokens` are the sizes of its training data.

    Time and the largest micro-batch are known where the cluster's accelerator is.
    """
    tokens, world_size = config.batch.sizes.until(config.total_steps), cluster.world_size
    flops, available = float(flops_per_token(config.model)) * tokens, _available_bytes(cluster)
    hours = None
    if cluster.accelerator is not None:
        hours = gpu_hours(flops, cluster.accelerator, config.precision, mfu)
    one_checkpoint = checkpoint_bytes(config)
    return Plan(
        parameters=parameter_count(config.model),
        world_size=world_size,
        micro_batches=config.micro_batches(world_size),
        steps=config.total_steps,
        tokens=tokens,
        epochs=tokens / sum(train_tokens) if train_tokens else None,
        sources=_shares(config, train_tokens) if train_tokens else (),
        flops=flops,
        memory=memory(config, world_size, on_cpu=cluster.gpus_per_node == 0),
        largest_micro_batch=largest_micro_batch(config, world_size, available) if available else None,
        assumed_mfu=mfu,
        gpu_hours=hours,
        days=None if hours is None else hours / world_size / 24,
        checkpoint_bytes=one_checkpoint,
        host_copy_bytes=host_copy_bytes(config, cluster),
        disk_bytes=one_checkpoint * (sum(checkpoint_counts(config).values()) + 1),
    )


def sequences(config: RunConfig) -> int:
    """How many sequence numbers the run comes to, those that it passes over included."""
    return SkipList(config.data.skip).numbers_behind(config.batch_sizes.until(config.total_steps))


def mixture_of(config: RunConfig, train_tokens: Sequence[int]) -> Mixture:
    """The order in which the run reads its sources, of `train_tokens` each and at least one sequence."""
    return Mixture(
        [windows_in(tokens, config.model.context) for tokens in train_tokens],
        [source.weight for source in config.data.sources],
        config.seed,
        later=config.stages,
        caps=[source.max_epochs for source in config.data.sources],
    )


def _shares(config: RunConfig, train_tokens: Sequence[int]) -> tuple[Share, ...]:
    counts = mixture_of(config, train_tokens).counts(sequences(config))
    context = config.model.context
    return tuple(
        Share(str(source.path), count, count * context, count / windows_in(tokens, context))
        for source, count, tokens in zip(config.data.sources, counts, train_tokens, strict=True)
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: master weights and moments, all in fp32."""
    moments = config.optimizer.model_copy(update={"moments": "fp32"})
    return state_bytes(config.model_copy(update={"optimizer": moments}))


def checkpoint_counts(config: RunConfig) -> dict[str, int]:
    """Most checkpoints that stand on disk at a time, by the field that keeps them."""
    checkpoint = config.checkpoint
    for_ever = config.total_steps // checkpoint.keep_every if checkpoint.keep_every is not None else 0
    counts = {"keep_last": checkpoint.keep_last, "keep_best": checkpoint.keep_best, "keep_every": for_ever}
    return {name: count for name, count in counts.items() if count}


def gpu_hours(flops: float, accelerator: str, precision: str, mfu: float) -> float:
    """Hours of one `accelerator` for so many FLOPs at that share of its peak in `precision`."""
    model = accelerator.partition("-")[0].upper()  # a100-80gb: its memory does not matter here
    return flops / (PEAK_FLOPS_PER_SECOND[model][precision] * mfu) / 3600


def memory_problem(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why the training state cannot fit the cluster's accelerator, or None (also where it is not known)."""
    available = _available_bytes(cluster)
    if available is None:
        return None
    needed = memory(config, cluster.world_size)
    if needed.state < available:
        return None
    return (
        f"the training state needs {size(needed.state)} on each of {cluster.world_size} ranks "
        f"(zero.stage = {config.zero.stage}), {cluster.accelerator} has {size(available)} for it. "
        "Use more GPUs, a higher zero.stage, or a smaller model."
    )


def memory_warning(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why a step will probably not fit, though the training state does."""
    available = _available_bytes(cluster)
    if available is None or memory_problem(config, cluster) is not None:
        return None
    needed = memory(config, cluster.world_size)
    if needed.peak <= available:
        return None
    largest = largest_micro_batch(config, cluster.world_size, available)
    advice = (
        f"batch.micro_batch = {largest} fits"
        if largest
        else "use model.recompute = 'full', a higher zero.stage or more GPUs"
    )
    return (
        f"a step needs about {size(needed.peak)} on each rank, of which {size(needed.activations)} for the "
        f"activations of batch.micro_batch = {config.batch.micro_batch}; {cluster.accelerator} has "
        f"{size(available)} for it: {advice}."
    )


def host_copy_bytes(config: RunConfig, cluster: ClusterConfig) -> int:
    """Host memory of a node for the copies of the state from which asynchronous saves are written."""
    if not config.checkpoint.asynchronous:
        return 0
    return checkpoint_bytes(config) * cluster.processes // cluster.world_size


def host_memory_warning(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why saves will probably be synchronous: the nodes lack the memory for a copy of the state.

    What a node has is known of Slurm nodes whose mem is given, and of this machine.
    """
    copies = host_copy_bytes(config, cluster)
    if (known := scheduler_of(cluster.kind).node_memory(cluster)) is None:
        return None
    total, which = known
    left = total - cluster.processes * _host_bytes(config, cluster)
    if copies <= LARGEST_SHARE * left:
        return None
    return (
        f"checkpoint.asynchronous needs {size(copies)} of host memory on each node for a copy of the state; "
        f"beside training {size(max(0, left))} are left ({which}). Training will wait while a checkpoint is "
        "written. Give more memory or nodes, or set checkpoint.asynchronous = false to say that you know."
    )


def _host_bytes(config: RunConfig, cluster: ClusterConfig) -> int:
    """Host memory of one process beside the copy of its state."""
    bytes_of_training = 0
    if not cluster.gpus_per_node:
        bytes_of_training = memory(config, cluster.world_size, on_cpu=True).peak
    elif config.zero.offload_optimizer == "cpu":
        # ZeRO-Offload also keeps the fp32 gradient of its part there.
        bytes_of_training = (state_bytes(config) + 4 * parameter_count(config.model)) // cluster.world_size
    return _PROCESS_BYTES + bytes_of_training


def _available_bytes(cluster: ClusterConfig) -> float | None:
    if cluster.accelerator is None or not cluster.gpus_per_node:
        return None
    return ACCELERATOR_MEMORY_GIB[cluster.accelerator] * _GIB * USABLE_FRACTION


def table(plan: Plan) -> list[tuple[str, str]]:
    """The plan as rows for people."""
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("processes", f"{plan.world_size}, {plan.micro_batches} micro-batches each a step"),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}" + (f" ({plan.epochs:.2f} epochs)" if plan.epochs is not None else "")),
        *(
            (f"of {share.path}", f"{share.sequences:,} sequences, {share.epochs:.2f} epochs")
            for share in (plan.sources if len(plan.sources) > 1 else ())
        ),
        ("compute", f"{plan.flops:.3g} FLOPs"),
        *(
            [("time", f"{plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU hours at MFU {plan.assumed_mfu:.0%}")]
            if plan.days is not None
            else []
        ),
        ("memory a rank, weights", size(plan.memory.weights)),
        ("memory a rank, optimizer", size(plan.memory.optimizer)),
        ("memory a rank, gradients", size(plan.memory.gradients)),
        ("memory a rank, activations", size(plan.memory.activations)),
        ("memory a rank, working buffers", size(plan.memory.workspace)),
        ("memory a rank, at its peak", f"about {size(plan.memory.peak)}"),
        *(
            [("largest micro-batch that fits", str(plan.largest_micro_batch))]
            if plan.largest_micro_batch is not None
            else []
        ),
        ("one checkpoint", size(plan.checkpoint_bytes)),
        ("host memory a node, for saves", size(plan.host_copy_bytes)),
        ("disk for checkpoints", size(plan.disk_bytes)),
    ]
