"""What a run will need: parameters, memory a rank, steps, disk. Pure: config in, numbers out.

Memory is that of the training state (parameters, gradients, master weights, moments), which is exact up to
buckets and padding; activations depend on kernels and are given as a rough upper figure, marked as such.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.batches import windows_in
from data_pipeline.mixture import Mixture
from data_pipeline.skip_list import SkipList
from gpt.config import RunConfig
from gpt.flops import flops_per_token, parameter_count
from launcher.cluster import ACCELERATOR_MEMORY_GIB, ClusterConfig

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 master weight and AdamW's two moments
_GIB = 2**30


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
    state_bytes_per_rank: int
    activation_bytes_per_rank: int
    checkpoint_bytes: int
    disk_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def plan(config: RunConfig, cluster: ClusterConfig, train_tokens: Sequence[int] | None) -> Plan:
    """The needs of a resolved `config` on `cluster`; `train_tokens` are the sizes of its training data."""
    parameters = parameter_count(config.model)
    tokens = config.batch.sizes.until(config.total_steps)
    checkpoint_bytes = CHECKPOINT_BYTES_PER_PARAMETER * parameters
    return Plan(
        parameters=parameters,
        world_size=cluster.world_size,
        micro_batches=config.micro_batches(cluster.world_size),
        steps=config.total_steps,
        tokens=tokens,
        epochs=tokens / sum(train_tokens) if train_tokens else None,
        sources=_shares(config, train_tokens) if train_tokens else (),
        flops=float(flops_per_token(config.model)) * tokens,
        state_bytes_per_rank=state_bytes_per_rank(config, cluster.world_size),
        activation_bytes_per_rank=activation_bytes_per_rank(config),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * (config.checkpoint.keep_last + 1),
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


def state_bytes_per_rank(config: RunConfig, world_size: int) -> int:
    """Bytes of parameters, gradients and optimizer state that one rank holds.

    ZeRO, arXiv:1910.02054, section 3: (2 + 2 + 12) bytes a parameter in mixed precision, of which stage 1
    shards the 12, stage 2 the gradients too, stage 3 the weights too. Gradients are accumulated in fp32
    here: 4 instead of 2.
    """
    parameters = parameter_count(config.model)
    weight_bytes = 2 if config.precision == "bf16" else 4
    weights = weight_bytes * parameters // (world_size if config.zero.stage == 3 else 1)
    gradients = 4 * parameters // (world_size if config.zero.stage >= 2 else 1)
    optimizer = 12 * parameters // world_size
    return weights + gradients + optimizer


def activation_bytes_per_rank(config: RunConfig) -> int:
    """Bytes that one micro-batch keeps for the backward pass, roughly.

    Korthikanti et al., arXiv:2205.05198, table 2 without the attention matrix (34·s·b·h bytes a layer in
    16 bits), widened for a gated feed-forward, and the fp32 logits with their gradient.
    """
    model = config.model
    tokens = config.batch.micro_batch * model.context
    wide = 2 if config.precision == "fp32" else 1
    feed_forward = (3 if model.is_gated else 2) * 2 * model.ffn_width
    per_layer = tokens * (18 * model.d_model + feed_forward) * wide
    return model.n_layers * per_layer + 2 * 4 * tokens * model.vocabulary


def memory_problem(config: RunConfig, cluster: ClusterConfig) -> str | None:
    """Why the training state cannot fit the cluster's accelerator, or None (also where it is not known)."""
    if cluster.accelerator is None or not cluster.gpus_per_node:
        return None
    available = ACCELERATOR_MEMORY_GIB[cluster.accelerator]
    needed = state_bytes_per_rank(config, cluster.world_size) / _GIB
    if needed < available:
        return None
    return (
        f"the training state needs {needed:.1f} GiB on each of {cluster.world_size} ranks "
        f"(zero.stage = {config.zero.stage}), {cluster.accelerator} has {available:.1f} GiB. "
        "Use more GPUs, a higher zero.stage, or a smaller model."
    )


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
        ("memory a rank, training state", size(plan.state_bytes_per_rank)),
        ("memory a rank, activations", f"about {size(plan.activation_bytes_per_rank)}"),
        ("one checkpoint", size(plan.checkpoint_bytes)),
        ("disk for checkpoints", size(plan.disk_bytes)),
    ]


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
