"""What the run's devices could do at most, which MFU is a share of."""

import time

import torch

from gpt.distributed.world import World, total
from gpt.model.flops import PEAK_FLOPS_PER_SECOND
from gpt.model.hardware import compute_dtype


def peak_flops_per_second(world: World, precision: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of all ranks' devices together, None with a GPU that the table does not know. Collective.

    Of a GPU its data sheet's; of a CPU what a large matrix product reaches while all ranks compute one.
    """
    if world.device.type == "cuda":
        own = of_gpu(torch.cuda.get_device_name(world.device), precision)
    else:
        own = _measured(dtype)
    peak, unknown = total(world, own or 0.0, float(own is None))
    return None if unknown else peak


def of_gpu(name: str, precision: str) -> float | None:
    """The peak of the GPU that calls itself `name`, or None."""
    words = name.replace("-", " ").split()
    fitting = [gpu for gpu in PEAK_FLOPS_PER_SECOND if set(gpu.split()) <= set(words)]
    return PEAK_FLOPS_PER_SECOND[max(fitting, key=len)][precision] if fitting else None


def _measured(dtype: torch.dtype) -> float:
    """The best of a few products, in the dtype in which a CPU really multiplies `dtype`."""
    width = 1024
    a = torch.ones(width, width, dtype=dtype)
    a = a.to(compute_dtype(a))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * width**3 / min(times)
