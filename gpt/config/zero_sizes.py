"""How many elements ZeRO reduces, gathers and keeps whole at a time. Torch-free.

The DeepSpeed config and the memory plan read the same sizes.
"""

from dataclasses import dataclass
from math import prod

from gpt.config.parameter_table import block_numel, parameter_table
from gpt.config.run import RunConfig

# Smaller messages do not fill a link: 32 MiB in bf16, near the 25 MB of torch's DDP.
_LEAST_BUCKET_NUMEL = 2**24


@dataclass(frozen=True)
class ZeroSizes:
    """Elements of gradients and weights; the last two matter at stage 3 only."""

    bucket_numel: int  # gradient elements that are reduced together
    prefetch_numel: int  # weight elements that are gathered ahead of their use
    whole_below_numel: int  # parameters with no more elements stay whole on every rank


def sums_whole_gradients(run: RunConfig, world_size: int) -> bool:
    """Whether each rank sums the gradients of its micro-batches whole in fp32 and reduces them once a step.

    In bf16 each gradient is then added as soon as it is computed, and freed.
    """
    is_summed = run.precision == "bf16" and run.micro_batches(world_size) > 1
    return is_summed and run.zero.stage == 1 and run.zero.offload_optimizer == "none"


def zero_sizes(run: RunConfig) -> ZeroSizes:
    """The sizes that [zero] sets; the defaults follow from the model.

    By default a bucket and a prefetch hold one block, so that communication for a block overlaps with the
    computation of its neighbour, and norms and biases stay whole.
    """
    zero, block = run.zero, block_numel(run.model)
    vectors = [prod(shape) for _, shape in parameter_table(run.model) if len(shape) == 1]
    return ZeroSizes(
        bucket_numel=zero.bucket_numel or max(block, _LEAST_BUCKET_NUMEL),
        prefetch_numel=zero.prefetch_numel or block,
        whole_below_numel=zero.whole_below_numel or max(vectors, default=0),
    )
