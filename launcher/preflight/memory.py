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
from gpt.config.zero_sizes import zero_sizes
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
    optimizer = state_bytes(config) // world_size if zero.offload_optimizer == "none" else 0
    kept, buckets, reducing, at_head, update = _gradient_bytes(config, world_size, on_cpu=on_cpu)
    gathered = _gathered_bytes(config, world_size)
    activations, loss = activation_bytes(config), _loss_bytes(config, on_cpu=on_cpu)
    recomputed = _tokens(config) * _block(config.model, width) if config.model.recompute != "none" else 0
    # The weights of a block arrive in one buffer, from which they are copied.
    arriving = width * block_numel(config.model) if gathered else 0
    forward = gathered + activations - recomputed + max(loss, arriving)
    # The head comes first, when no block has been recomputed yet.
    backward = gathered + buckets + reducing + max(activations, activations - recomputed + at_head)
    if zero.stage == 3:  # the bucket is never freed
        forward, update = forward + buckets, update + buckets
    return Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=kept + buckets,
        activations=activations,
        workspace=gathered + max(loss, reducing + at_head, update),
        peak=weights + optimizer + kept + max(forward, backward, update),
    )


def _gathered_bytes(config: RunConfig, world_size: int) -> int:
    """Bytes of the weights of other ranks that stage 3 has gathered at a time."""
    if config.zero.stage < 3 or world_size == 1:
        return 0
    return _bytes(config) * min(parameter_count(config.model), _MOST_GATHERED_NUMEL)


def _gradient_bytes(config: RunConfig, world_size: int, *, on_cpu: bool) -> tuple[int, int, int, int, int]:
    """Bytes of gradients.

    Kept between micro-batches; in buckets; while a bucket is reduced; in addition while the head's is; in the
    update.

    A gradient is reduced in a bucket as soon as that is full, and each rank keeps its part. On GPUs there are
    two buckets at stages 1 and 2, one of which fills while the other is reduced.
    """
    zero, model, width = config.zero, config.model, _bytes(config)
    parameters = parameter_count(model)
    shard = parameters // world_size
    is_accumulating = config.micro_batches(world_size) > 1
    in_fp32 = 4 if is_accumulating or width == 4 else width  # bytes of an element that is kept
    on_device = zero.offload_optimizer == "none"
    bucket = width * zero_sizes(config).bucket_numel
    # The update needs this rank's gradient flat and in fp32.
    update = (4 * shard + (0 if in_fp32 == 4 else in_fp32 * shard)) if on_device else 0
    if zero.stage == 3:
        return in_fp32 * shard, bucket, 0, 0, update
    if zero.stage == 1 and is_accumulating:
        # Every rank keeps the whole gradient, and reduces it only in the last micro-batch. In bf16 the
        # gradient of the micro-batch stays until the next backward pass; the sum is reduced as one bf16 copy,
        # after all groups have been put together unless they are large.
        raw = width * parameters
        if config.precision != "bf16":
            return in_fp32 * parameters, bucket, raw, 0, update
        joined = 4 * parameters if parameters < _JOINED_BELOW_NUMEL else 0
        return 4 * parameters, 0, raw, 0, raw + joined + 2 * parameters
    head, buckets = model.vocabulary * model.d_model, (1 if on_cpu else 2) * bucket
    if is_accumulating:  # the last rank's part of the head's gradient is added in fp32
        return 4 * shard, buckets, bucket, width * head + 4 * min(head, shard), 0
    if zero.stage == 1:  # keeps the head's gradient until the update
        return 0, buckets, bucket + width * head, 0, width * shard + update
    return 0, buckets, bucket, width * head, width * shard + update


def largest_micro_batch(config: RunConfig, world_size: int, available: float) -> int | None:
    """The largest micro-batch that divides the global batch and keeps the peak within `available` bytes."""
    for micro_batch in range(config.global_batch * config.parallel.sequence // world_size, 0, -1):
        smaller = config.with_tables(batch=config.batch.with_micro_batch(micro_batch))
        if smaller.batch_problem(world_size) is None and memory(smaller, world_size).peak <= available:
            return micro_batch
    return None


def activation_bytes(config: RunConfig) -> int:
    """Bytes that one micro-batch keeps for the backward pass, without the buffers inside kernels.

    Counted as in Korthikanti et al. (arXiv:2205.05198, section 4), for this network's own operations. A test
    compares it with the tensors that autograd saves.
    """
    model, tokens, width = config.model, _tokens(config), _bytes(config)
    last_norm = _norm(model, width) if model.norm_placement == "pre" else 0
    at_head = width * model.d_model  # the loss computes its input's gradient in the forward pass
    block = _block(model, width)
    if model.recompute == "none":
        kept = model.n_layers * block
    else:
        inside = width * model.d_model
        if model.recompute == "selective":
            inside += _products(model, width)
        kept = model.n_layers * inside + block  # one block is recomputed at a time
    return tokens * (kept + last_norm + at_head)


def _block(model: ModelConfig, width: int) -> int:
    """Bytes per token of one block."""
    attention = width * (model.n_heads + 2 * model.kv_heads) * model.head_width  # q, k and v in one tensor
    if model.position == "rope" or model.qk_norm:
        # rotated or normalised copies of q and k
        attention += width * (model.n_heads + model.kv_heads) * model.head_width
    if model.qk_norm:
        attention += (4 + width) * (model.n_heads + model.kv_heads) * model.head_width
    attention += width * model.n_heads * model.head_width + 4 * model.n_heads  # result and log-sum-exp
    # tensors of the feed-forward's width that its activation keeps
    kept = {"relu": 1, "bilinear": 3, "gelu": 2, "swish": 2, "relu2": 2}.get(model.ffn, 4)
    dropped = 2 * model.d_model if model.dropout else 0  # masks of a byte an element
    return 2 * _norm(model, width) + attention + kept * width * model.ffn_width + dropped


def _norm(model: ModelConfig, width: int) -> int:
    """Bytes per token of a norm over the model's width, including its result."""
    if model.norm == "layernorm":
        return 2 * width * model.d_model + 8
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
