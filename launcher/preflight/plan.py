"""What a run needs: parameters, memory per rank, time, disk. Pure functions of config and cluster.

The time estimate assumes a fraction of the accelerator's peak FLOPs (MFU). The memory estimate is that of
launcher/preflight/memory.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.sampling.batches import windows_in
from data_pipeline.sampling.mixture import Mixture
from data_pipeline.sampling.skip_list import SkipList
from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from gpt.model.flops import PEAK_FLOPS_PER_SECOND, flops_per_token
from gpt.run.host_memory import LARGEST_SHARE
from launcher.cluster import ACCELERATOR_MEMORY_GIB, ClusterConfig
from launcher.preflight.memory import (
    Memory,
    gradient_traffic_bytes,
    largest_micro_batch,
    memory,
    state_bytes,
)
from launcher.scheduler.registry import scheduler_of
from launcher.units import size

_GIB = 2**30
# The CUDA context and NCCL take one to two GiB of the rest; fragmentation takes the remainder.
USABLE_FRACTION = 0.92
# Well-tuned runs reach it: the GPU hours of Llama 2 (arXiv:2307.09288, table 2) imply 0.42 to 0.46.
ASSUMED_MFU = 0.4
_PROCESS_BYTES = 1 << 29  # Python, torch and DeepSpeed before training starts: measured 358 MiB on a CPU


@dataclass(frozen=True)
class Share:
    """What the run reads from one source."""

    path: str
    sequences: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class Plan:
    """What one run needs on one cluster."""

    parameters: int
    world_size: int
    micro_batches: int
    steps: int
    tokens: int
    epochs: float | None
    sources: tuple[Share, ...]
    flops: float
    memory: Memory
    gradient_traffic_bytes: int
    largest_micro_batch: int | None
    assumed_mfu: float
    gpu_hours: float | None
    days: float | None
    checkpoint_bytes: int
    host_copy_bytes: int
    disk_bytes: int
    cost: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        return asdict(self)


def plan(
    config: RunConfig,
    cluster: ClusterConfig,
    train_tokens: Sequence[int] | None,
    mfu: float = ASSUMED_MFU,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """What a run of the resolved `config` needs on `cluster`; `train_tokens` are the sizes of its sources.

    Time and the largest micro-batch are None unless the cluster file names an accelerator.
    """
    tokens, world_size = config.batch.sizes.until(config.total_steps), cluster.world_size
    flops, available = float(flops_per_token(config.model)) * tokens, available_bytes(cluster)
    hours = None
    if cluster.accelerator is not None:
        hours = gpu_hours(flops, cluster.accelerator, config.precision, mfu)
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
        gradient_traffic_bytes=gradient_traffic_bytes(config, world_size),
        largest_micro_batch=largest_micro_batch(config, world_size, available) if available else None,
        assumed_mfu=mfu,
        gpu_hours=hours,
        days=None if hours is None else hours / world_size / 24,
        checkpoint_bytes=checkpoint_bytes(config),
        host_copy_bytes=host_copy_bytes(config, cluster),
        disk_bytes=disk_bytes(config),
        cost=None if hours is None or price_per_gpu_hour is None else hours * price_per_gpu_hour,
    )


def sequences(config: RunConfig) -> int:
    """How many sequence numbers the run uses, including the skipped ones."""
    return SkipList(config.data.skip).numbers_consumed(config.batch_sizes.until(config.total_steps))


def mixture_of(config: RunConfig, train_tokens: Sequence[int]) -> Mixture:
    """The order in which the run reads its sources; each must hold at least one sequence."""
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
    return state_bytes(config, moment_bytes=4)


def checkpoint_counts(config: RunConfig) -> dict[str, int]:
    """The largest number of checkpoints on disk at a time, by the field that keeps them."""
    checkpoint = config.checkpoint
    for_ever = config.total_steps // checkpoint.keep_every if checkpoint.keep_every is not None else 0
    counts = {"keep_last": checkpoint.keep_last, "keep_best": checkpoint.keep_best, "keep_every": for_ever}
    return {name: count for name, count in counts.items() if count}


def disk_bytes(config: RunConfig) -> int:
    """Bytes of the checkpoints that `config` keeps, and of the one that is being written."""
    return checkpoint_bytes(config) * (sum(checkpoint_counts(config).values()) + 1)


def gpu_hours(flops: float, accelerator: str, precision: str, mfu: float) -> float:
    """GPU hours that `flops` take on `accelerator` at the fraction `mfu` of its peak in `precision`."""
    model = accelerator.partition("-")[0].upper()  # the memory size in a100-80gb does not matter
    return flops / (PEAK_FLOPS_PER_SECOND[model][precision] * mfu) / 3600


def memory_problem(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why the training state does not fit on the cluster's accelerator; None if it fits or is unknown."""
    available = available_bytes(cluster)
    if available is None:
        return None
    needed = memory(config, cluster.world_size)
    if needed.state < available:
        return None
    return (
        f"the training state needs {size(needed.state)} on each of {cluster.world_size} ranks "
        f"(zero.stage = {config.zero.stage}), but {cluster.accelerator} has only {size(available)} for it. "
        "Use more GPUs, a higher zero.stage, or a smaller model."
    )


def memory_warning(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why a step probably does not fit in memory although the training state does; None otherwise."""
    available = available_bytes(cluster)
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
        f"a step needs about {size(needed.peak)} on each rank, including {size(needed.activations)} for the "
        f"activations of batch.micro_batch = {config.batch.micro_batch}, but {cluster.accelerator} has only "
        f"{size(available)} for it: {advice}."
    )


def host_copy_bytes(config: RunConfig, cluster: ClusterConfig) -> int:
    """Host memory per node for the copy of the training state from which asynchronous saves write."""
    if not config.checkpoint.asynchronous:
        return 0
    return checkpoint_bytes(config) * cluster.processes // cluster.world_size


def host_memory_problem(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why the training state does not fit in the host memory of a node; None if it does or is unknown."""
    if (known := scheduler_of(cluster.kind).node_memory(cluster)) is None:
        return None
    available, which = known
    each = _host_bytes(config, cluster, at_peak=False)
    if cluster.processes * each <= available:
        return None
    advice = (
        "Use fewer processes, a higher zero.stage on more nodes, or a smaller model"
        if not cluster.gpus_per_node
        else "Use more nodes, or zero.offload_optimizer = 'none'"
    )
    return (
        f"the training state needs {size(cluster.processes * each)} of host memory on each node "
        f"({cluster.processes} × {size(each)}), but there are only {size(available)} ({which}). {advice}."
    )


def host_memory_warning(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why a step probably does not fit in host memory, or why saves will probably be synchronous.

    The latter happens when the nodes lack memory for a copy of the training state. The memory of a node is
    known for this machine, and for Slurm nodes if the cluster file sets `mem`.
    """
    copies = host_copy_bytes(config, cluster)
    if (known := scheduler_of(cluster.kind).node_memory(cluster)) is None:
        return None
    if host_memory_problem(config, cluster) is not None:
        return None
    total, which = known
    needed = cluster.processes * _host_bytes(config, cluster)
    if needed > total:
        return (
            f"a step needs about {size(needed)} of host memory on each node, but there are only "
            f"{size(total)} ({which}): use a smaller batch.micro_batch, model.recompute = 'full', or fewer "
            "processes."
        )
    left = total - needed
    if copies <= LARGEST_SHARE * left:
        return None
    return (
        f"checkpoint.asynchronous needs {size(copies)} of host memory on each node for a copy of the "
        f"training state, but training leaves only {size(left)} ({which}). Training will wait while "
        "a checkpoint is written. Use more memory or more nodes, or set checkpoint.asynchronous = false to "
        "accept this."
    )


def _host_bytes(config: RunConfig, cluster: ClusterConfig, *, at_peak: bool = True) -> int:
    """Host memory of one process, without the copy of its state: at the peak of a step, or between steps."""
    bytes_of_training = 0
    if not cluster.gpus_per_node:
        needed = memory(config, cluster.world_size, on_cpu=True)
        bytes_of_training = needed.peak if at_peak else needed.state
    elif config.zero.offload_optimizer == "cpu":
        # ZeRO-Offload also keeps the fp32 gradients of its partition in host memory.
        bytes_of_training = (state_bytes(config) + 4 * parameter_count(config.model)) // cluster.world_size
    return _PROCESS_BYTES + bytes_of_training


def available_bytes(cluster: ClusterConfig) -> float | None:
    """Bytes of a GPU that a rank can use; None if the cluster file names no accelerator."""
    if cluster.accelerator is None or not cluster.gpus_per_node:
        return None
    return ACCELERATOR_MEMORY_GIB[cluster.accelerator] * _GIB * USABLE_FRACTION


def _why_less(plan: Plan) -> str:
    """Why the peak is less than the sum of the rows above it."""
    memory = plan.memory
    rows = memory.state + memory.activations + memory.workspace
    if memory.peak >= rows:
        return ""
    absent = {
        "the forward pass": "before the gradients",
        "the backward pass": "before the update",
        "the update": "after the activations are freed",
    }[memory.peak_at]
    return f" ({absent}: less than the sum)"


def table(plan: Plan) -> list[tuple[str, str]]:
    """The plan as rows of name and value."""
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("processes", f"{plan.world_size}, each with {plan.micro_batches} micro-batches per step"),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}" + (f" ({plan.epochs:,.2f} epochs)" if plan.epochs is not None else "")),
        *(
            (f"  from {share.path}", f"{share.sequences:,} sequences, {share.epochs:,.2f} epochs")
            for share in (plan.sources if len(plan.sources) > 1 else ())
        ),
        ("compute", f"{plan.flops:.3g} FLOPs"),
        *(
            [("time", f"{plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU hours at {plan.assumed_mfu:.0%} MFU")]
            if plan.days is not None
            else []
        ),
        *([("cost", f"{plan.cost:,.0f}")] if plan.cost is not None else []),
        ("memory per rank: weights", size(plan.memory.weights)),
        ("memory per rank: optimizer", size(plan.memory.optimizer)),
        ("memory per rank: gradients", size(plan.memory.gradients)),
        ("memory per rank: activations", size(plan.memory.activations)),
        ("memory per rank: buffers", size(plan.memory.workspace)),
        (
            "memory per rank: peak",
            f"about {size(plan.memory.peak)}, in {plan.memory.peak_at}{_why_less(plan)}",
        ),
        *(
            [("gradients reduced per step", size(plan.gradient_traffic_bytes))]
            if plan.gradient_traffic_bytes
            else []
        ),
        *(
            [("largest micro-batch that fits", str(plan.largest_micro_batch))]
            if plan.largest_micro_batch is not None
            else []
        ),
        ("size of one checkpoint", size(plan.checkpoint_bytes)),
        ("host memory per node for saves", size(plan.host_copy_bytes)),
        ("disk space for checkpoints", size(plan.disk_bytes)),
    ]
