"""What a device can do.

No other file of gpt/model asks for the kind of its device, so that a test can substitute another one here.
"""

import torch
from torch import Tensor

# Whether the CPU multiplies 16-bit matrices fast. Without AVX-512 torch uses a reference loop, which reached
# 1 GFLOP/s per core in bf16 on an AVX2 machine where fp32 reached 45 to 90. Asked once, because a call of
# torch.ops in compute_dtype would break the graph of torch.compile.
CPU_MULTIPLIES = {
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


def is_cpu(device: torch.device) -> bool:
    """Whether `device` is the host's processor."""
    return device.type == "cpu"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor number of a CUDA device's compute capability; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply `x`: its own, or fp32 on a CPU that multiplies 16-bit matrices slowly.

    The caller rounds the result to `x.dtype`, which gives what a kernel with fp32 accumulation gives.
    """
    return torch.float32 if is_cpu(x.device) and not CPU_MULTIPLIES.get(x.dtype, True) else x.dtype
