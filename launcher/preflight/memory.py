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
    `world_size` parts, stage 2 the gradients too, stage 3 the weights too. The peak is either the end of the
    forward pass, when all activations exist, or the update, when all gradients exist; stage 3 reserves room
    for the gradients of its shard throughout.
    """
    zero, model = config.zero, config.model
    parameters, width = parameter_count(model), _bytes(config)
    on_device = zero.offload_optimizer == "none"
    weights = width * parameters
    gathered = 0
    if zero.stage == 3:
        weights //= world_size
        if zero.offload_parameters == "cpu":
            weights = 0
        elif zero.secondary_shards > 1:
            weights += width * parameters // zero.secondary_shards
        # Gathered at a time: two blocks (one computes, the next arrives), the embedding and the head.
        gathered = width * (2 * block_numel(model) + 2 * model.vocabulary * model.d_model)
    optimizer = state_bytes(config) // world_size if on_device else 0
    gradients = width * parameters
    if zero.stage >= 2:
        gradients = gradients // world_size + width * zero_sizes(config).bucket_numel
    is_summed_whole = sums_whole_gradients(config, world_size)
    if is_summed_whole:  # a parameter's gradient is freed before the next one is computed
        gradients = width * max(prod(shape) for _, shape in parameter_table(model))
    accumulated = 0
    if config.micro_batches(world_size) > 1 and config.precision != "fp32":
        accumulated = 4 * parameters // (world_size if zero.stage >= 2 else 1)
    update = 4 * parameters // world_size if on_device else 0  # the fp32 copy of the gradient
    activations = activation_bytes(config, on_cpu=on_cpu)
    loss = _loss_bytes(config, on_cpu=on_cpu)
    reduction = _reduction_bytes(config, is_summed_whole=is_summed_whole)
    fixed = weights + optimizer + accumulated + gathered + reduction
    forward = activations + loss + (gradients if zero.stage == 3 else 0)
    is_forward = forward > gradients + update
    return Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients + accumulated,
        activations=activations,
        workspace=loss + gathered + update + reduction,
        peak=fixed + max(forward, gradients + update),
        peak_at="the end of the forward pass" if is_forward else "the update",
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


def _reduction_bytes(config: RunConfig, *, is_summed_whole: bool) -> int:
    """Copies of the gradients that are reduced at a time.

    One is in zero.reduce_dtype, unless the gradients have that dtype already; stage 3 also interleaves the
    shards of all ranks. Where every rank sums its micro-batches in fp32, that whole sum is reduced.
    """
    zero = config.zero
    width = 4 if zero.reduce_dtype == "fp32" else 2
    reduced = parameter_count(config.model)
    if not is_summed_whole:
        reduced = min(reduced, zero_sizes(config).bucket_numel)
    converted = width * reduced if width != (4 if is_summed_whole else _bytes(config)) else 0
    return converted + (width * reduced if zero.stage == 3 else 0)


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

    The logits of a chunk; for a block of it the logits and log p in fp32 and the gradient; the gradient of
    the head.
    """
    model, tokens, width = config.model, _tokens(config), _bytes(config)
    head = model.vocabulary * model.d_model
    # Most CPUs compute 16-bit products in fp32 (gpt.model.hardware.compute_dtype).
    wide = 4 if on_cpu else width
    elements = chunk_elements(is_bf16=config.precision == "bf16" and wide == width)
    rows = min(tokens, rows_within(elements, model.vocabulary))
    chunk = rows * model.vocabulary
    block = min(chunk, block_elements(is_cpu=on_cpu))
    is_summed = rows < tokens or wide != width  # the head's gradient is summed in fp32
    gradient = (4 if is_summed else 0) + width
    weight = wide if wide != width else 0
    return chunk * wide + block * (8 + wide) + head * (gradient + weight)


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
