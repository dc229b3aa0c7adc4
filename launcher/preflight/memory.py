"""The memory plan: what one rank holds, as a closed form of config and world size.

It counts weights, gradients, optimizer state, what one micro-batch keeps for its backward pass, and working
buffers. It does not count what the process holds before training: Python, torch, the CUDA context and NCCL's
buffers, one to two GiB on a GPU.
"""

from dataclasses import dataclass
from math import prod

from gpt.config.model import ModelConfig
from gpt.config.parameter_table import block_numel, parameter_count, parameter_table
from gpt.config.run import RunConfig
from gpt.config.zero_sizes import sums_whole_gradients, zero_sizes
from gpt.model.loss_chunks import block_elements, chunk_elements, rows_within

# DeepSpeed's defaults: stage 3 keeps up to so many weights gathered for reuse, and stage 1 with accumulation
# puts gradients together until it has so many.
_MOST_GATHERED_NUMEL = 10**9
_JOINED_BELOW_NUMEL = 5 * 10**8


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds, by kind, and at its peak."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    peak: int
    peak_at: str  # activations and the update's buffers do not exist at the same time

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def memory(config: RunConfig, world_size: int, *, on_cpu: bool = False) -> Memory:
    """The memory of each of `world_size` ranks, which are GPUs or CPU processes.

    ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3): stage 1 cuts the optimizer's state into
    `world_size` parts, stage 2 the gradients too, stage 3 the weights too. The peak is in the forward pass,
    in the backward pass or in the update. Tests compare it with what a dry step allocates (gpt.dry_run).
    """
    zero, parameters, width = config.zero, parameter_count(config.model), _bytes(config)
    weights = width * parameters
    if zero.stage == 3:
        weights = 0 if zero.offload_parameters == "cpu" else weights // world_size
        if zero.offload_parameters == "none" and zero.secondary_shards > 1:
            weights += width * parameters // zero.secondary_shards
    optimizer = state_bytes(config) // world_size if zero.offload_optimizer == "none" else 0
    gradients = _gradient_bytes(config, world_size, on_cpu=on_cpu)
    gathered = _gathered_bytes(config, world_size)
    activations, loss = activation_bytes(config, on_cpu=on_cpu), _loss_bytes(config, on_cpu=on_cpu)
    recomputed = 0
    if config.model.recompute != "none":
        recomputed = _tokens(config) * _block(config.model, width, on_cpu=on_cpu)
    # The weights of a block arrive in one buffer, from which they are copied.
    arriving = width * block_numel(config.model) if gathered else 0
    forward = gathered + activations - recomputed + max(loss, arriving)
    backward = (
        gathered
        + gradients.buckets
        + max(
            activations + gradients.reducing,
            activations - recomputed + gradients.at_head,
            gradients.at_embedding,
        )
    )
    update = gradients.update
    if zero.stage == 3:  # the bucket is never freed
        forward, update = forward + gradients.buckets, update + gradients.buckets
    moments = {"forward pass": forward, "backward pass": backward, "update": update}
    peak_at = max(moments, key=lambda moment: moments[moment])
    return Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients.kept + gradients.buckets,
        activations=activations,
        workspace=gathered + max(loss, gradients.reducing, gradients.at_head, update),
        peak=weights + optimizer + gradients.kept + moments[peak_at],
        peak_at=f"the {peak_at}",
    )


def _gathered_bytes(config: RunConfig, world_size: int) -> int:
    """Bytes of the weights of other ranks that stage 3 has gathered at a time."""
    if config.zero.stage < 3 or world_size == 1:
        return 0
    return _bytes(config) * min(parameter_count(config.model), _MOST_GATHERED_NUMEL)


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients and of their copies."""

    kept: int  # between micro-batches
    buckets: int
    update: int  # this rank's gradient, flat and in fp32
    reducing: int = 0  # while the gradients of a block are reduced
    at_head: int = 0  # while those of the head are, which come first
    at_embedding: int = 0  # while those of the embedding are, which come last


def _gradient_bytes(config: RunConfig, world_size: int, *, on_cpu: bool) -> _Gradients:
    """What the gradients of a step take.

    They are reduced in a bucket as soon as that is full, and each rank keeps its part. On GPUs there are two
    buckets at stages 1 and 2, one of which fills while the other is reduced.
    """
    zero, model, width = config.zero, config.model, _bytes(config)
    parameters, is_accumulating = parameter_count(model), config.micro_batches(world_size) > 1
    shard, numel = parameters // world_size, zero_sizes(config).bucket_numel
    kept_width = 4 if is_accumulating else width
    on_device = zero.offload_optimizer == "none"
    update = (4 * shard + (0 if kept_width == 4 else width * shard)) if on_device else 0
    reduced_width = 4 if zero.reduce_dtype == "fp32" else 2
    converted = reduced_width if reduced_width != width else 0  # bytes of a copy in zero.reduce_dtype
    if zero.stage == 3:
        return _Gradients(kept_width * shard, reduced_width * numel, update, converted * numel)
    if sums_whole_gradients(config, world_size):
        # A parameter's gradient is freed before the next one is computed. The sums are reduced in the last
        # micro-batch, all groups put together unless they are large.
        largest = width * max(prod(shape) for _, shape in parameter_table(model))
        joined = 4 * parameters if parameters < _JOINED_BELOW_NUMEL else 0
        converted = 2 * parameters if zero.reduce_dtype != "fp32" else 0
        return _Gradients(4 * parameters, largest, joined + converted)
    buckets = (1 if on_cpu else 2) * width * numel
    if zero.stage == 1 and is_accumulating:  # every rank keeps the whole gradient, and the buckets
        return _Gradients(kept_width * parameters + buckets, 0, update, (width + converted) * numel)
    head = model.vocabulary * model.d_model
    is_large = head > numel  # such a gradient is reduced by itself, outside the bucket
    of_head = converted * head if is_large else (width + converted) * numel
    if is_accumulating:  # the last rank adds its part of the head's gradient in fp32
        of_head += 4 * min(head, shard)
    own = 0 if is_accumulating else width * shard
    return _Gradients(
        kept=4 * shard if is_accumulating else 0,
        buckets=buckets,
        update=0 if is_accumulating else own + update,
        # Stage 1 keeps the head's gradient until the update.
        reducing=(width + converted) * numel + (width * head if zero.stage == 1 else 0),
        at_head=width * head + of_head,
        at_embedding=own + (2 * width + converted) * head if is_large else 0,
    )


def largest_micro_batch(config: RunConfig, world_size: int, available: float) -> int | None:
    """The largest micro-batch that divides the global batch and keeps the peak within `available` bytes."""
    per_rank, rest = divmod(config.global_batch * config.parallel.sequence, world_size)
    if rest:
        return None

    def smaller(micro_batch: int) -> RunConfig:
        return config.with_tables(batch=config.batch.with_micro_batch(micro_batch))

    # The peak grows with the micro-batch, so bisection finds the largest one that fits.
    fitting, too_large = 0, per_rank + 1
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if memory(smaller(middle), world_size).peak <= available:
            fitting = middle
        else:
            too_large = middle
    for micro_batch in range(fitting, 0, -1):
        if per_rank % micro_batch == 0 and smaller(micro_batch).batch_problem(world_size) is None:
            return micro_batch
    return None


def gradient_traffic_bytes(config: RunConfig, world_size: int) -> int:
    """Bytes of gradients that a rank hands to the reductions of a step.

    Stages 2 and 3 reduce the gradients of every micro-batch, stage 1 their sum.
    """
    width = 4 if config.zero.reduce_dtype == "fp32" else 2
    times = config.micro_batches(world_size) if config.zero.stage >= 2 else 1
    return width * parameter_count(config.model) * times if world_size > 1 else 0


def activation_bytes(config: RunConfig, *, on_cpu: bool = False) -> int:
    """Bytes that one micro-batch keeps for the backward pass, without the buffers inside kernels.

    Counted as in Korthikanti et al. (arXiv:2205.05198, section 4), for this network's own operations. A test
    compares it with the tensors that autograd saves.
    """
    model, tokens, width = config.model, _tokens(config), _bytes(config)
    last_norm = _norm(model, width, on_cpu=on_cpu) if model.norm_placement == "pre" else 0
    at_head = width * model.d_model  # the loss computes its input's gradient in the forward pass
    block = _block(model, width, on_cpu=on_cpu)
    if model.recompute == "none":
        kept = model.n_layers * block
    else:
        inside = width * model.d_model
        if model.recompute == "selective":
            inside += _products(model, width)
        kept = model.n_layers * inside + block  # one block is recomputed at a time
    return tokens * (kept + last_norm + at_head)


def _block(model: ModelConfig, width: int, *, on_cpu: bool) -> int:
    """Bytes per token of one block."""
    attention = width * (model.n_heads + 2 * model.kv_heads) * model.head_width  # q, k and v in one tensor
    if model.position == "rope" or model.qk_norm:
        # rotated or normalised copies of q and k
        attention += width * (model.n_heads + model.kv_heads) * model.head_width
    if model.qk_norm:
        # On a CPU its input in fp32 and normalised; the kernel of a GPU keeps the root of the mean square.
        kept_per_head = (4 + width) * model.head_width if on_cpu else 4
        attention += kept_per_head * (model.n_heads + model.kv_heads)
    attention += width * model.n_heads * model.head_width + 4 * model.n_heads  # result and log-sum-exp
    # tensors of the feed-forward's width that its activation keeps
    kept = {"relu": 1, "bilinear": 3, "gelu": 2, "swish": 2, "relu2": 2}.get(model.ffn, 4)
    dropped = 2 * model.d_model if model.dropout else 0  # masks of a byte an element
    return 2 * _norm(model, width, on_cpu=on_cpu) + attention + kept * width * model.ffn_width + dropped


def _norm(model: ModelConfig, width: int, *, on_cpu: bool) -> int:
    """Bytes per token of a norm over the model's width, including its result."""
    if model.norm == "layernorm":
        return 2 * width * model.d_model + 8
    if not on_cpu:
        return 2 * width * model.d_model + 4  # its input, scaled
    return (4 + 2 * width) * model.d_model + 4  # its input in fp32, normalised, scaled


def _products(model: ModelConfig, width: int) -> int:
    """Bytes per token of the results of a block's matrix products."""
    rows = (model.n_heads + 2 * model.kv_heads) * model.head_width + 2 * model.d_model
    return width * (rows + (2 if model.is_gated else 1) * model.ffn_width)


def _loss_bytes(config: RunConfig, *, on_cpu: bool) -> int:
    """Working memory of the loss.

    The logits of a chunk; for a block of it the logits and log p in fp32, or afterwards the gradient of the
    head.
    """
    model, tokens, width = config.model, _tokens(config), _bytes(config)
    head = model.vocabulary * model.d_model
    # Most CPUs compute 16-bit products in fp32 (gpt.model.hardware.compute_dtype).
    wide = 4 if on_cpu else width
    elements = chunk_elements(is_bf16=config.precision == "bf16" and wide == width)
    rows = min(tokens, rows_within(elements, model.vocabulary))
    chunk = rows * model.vocabulary
    block = min(chunk, block_elements(is_cpu=on_cpu))
    in_block = (4 if wide == 4 else 8) + (4 if model.z_loss else 0) + (8 if model.logit_softcap else 0)
    is_summed = rows < tokens or wide != width  # the head's gradient is summed in fp32
    always = head * ((4 if is_summed else 0) + (wide if wide != width else 0))
    return chunk * wide + always + max(block * in_block, head * width)


def state_bytes(config: RunConfig, *, moment_bytes: int | None = None) -> int:
    """Bytes of the master weights and optimizer states of the whole model.

    `moment_bytes` replaces the bytes of a moment's element that the config implies.
    """
    spec, moment_bytes = config.optimizer.spec, moment_bytes or config.optimizer.moment_bytes
    return sum(
        prod(shape) * spec.group(spec.group_of(name, shape, config.model)).bytes_per_parameter(moment_bytes)
        for name, shape in parameter_table(config.model)
    )


def _tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank."""
    return config.batch.micro_batch * config.model.context // config.parallel.sequence


def _bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 4 if config.precision == "fp32" else 2
