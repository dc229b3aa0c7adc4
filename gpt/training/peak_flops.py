"""The peak speed of the run's devices, the reference of MFU."""

import time

import torch

from gpt.distributed.world import World, total
from gpt.model.flops import peaks_of_gpu
from gpt.model.hardware import accelerator, compute_dtype


def peak_flops_per_second(world: World, precision: str, dtype: torch.dtype) -> float | None:
    """The FLOP/s of all ranks' devices together; None when a GPU is not in the table. Collective.

    A GPU counts with the number in its data sheet. A CPU counts with the speed of a large matrix product,
    measured while every rank computes one.
    """
    if (gpu := accelerator(world.device)) is not None:
        own = of_gpu(gpu.product(world.device), precision)
    else:
        own = _measured(dtype)
    peak, unknown = total(world, own or 0.0, float(own is None))
    return None if unknown else peak


def of_gpu(name: str, precision: str) -> float | None:
    """The peak of the GPU with this device name; None when it is not in the table."""
    peaks = peaks_of_gpu(name)
    return None if peaks is None else peaks[precision]


def _measured(dtype: torch.dtype) -> float:
    """The best speed of a few products, in the dtype that a CPU uses to multiply `dtype`."""
    width = 1024
    a = torch.ones(width, width, dtype=dtype)
    a = a.to(compute_dtype(a))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * width**3 / min(times)
