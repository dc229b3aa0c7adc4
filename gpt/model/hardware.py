"""What a kind of device can do.

No other file asks for the kind of a device. `outlast plan --trace` and tests add a kind of their own, so that
the code for GPUs runs without one.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

# Whether the CPU multiplies 16-bit matrices fast. Without AVX-512 torch uses a reference loop, which reached
# 1 GFLOP/s per core in bf16 on an AVX2 machine where fp32 reached 45 to 90. Asked once, because a call of
# torch.ops in compute_dtype would break the graph of torch.compile.
CPU_MULTIPLIES = {
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


class Event(Protocol):
    """A point in the work that is queued on a device."""

    def record(self) -> None:
        """Place the event behind everything that is queued so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has reached the event."""
        ...

    def query(self) -> bool:
        """Whether the device has reached the event."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`; both must have been reached."""
        ...


class Accelerator(Protocol):
    """A kind of device that computes while the host goes on, in memory of its own.

    It copies from and to the host without blocking only when the host's memory is pinned.
    """

    backend: str  # of torch.distributed

    def is_available(self) -> bool:
        """Whether this machine has one."""
        ...

    def count(self) -> int:
        """How many of them this process sees."""
        ...

    def use(self, device: torch.device) -> None:
        """Make `device` the one on which this thread allocates by default."""
        ...

    def synchronize(self, device: torch.device) -> None:
        """Wait until `device` has done everything that is queued."""
        ...

    def event(self, *, is_timed: bool = False) -> Event:
        """A new event; only timed ones have an elapsed time."""
        ...

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized host memory for copies that do not block the host."""
        ...

    def compute_capability(self, device: torch.device) -> tuple[int, int] | None:
        """Major and minor number of CUDA's compute capability; None when it is no CUDA device."""
        ...

    def product(self, device: torch.device) -> str:
        """The maker's name of the device."""
        ...

    def free_bytes(self, device: torch.device) -> tuple[int, int]:
        """Bytes that this process can use, and bytes in total."""
        ...


class Cuda:
    """NVIDIA's GPUs."""

    backend = "nccl"

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def count(self) -> int:
        return torch.cuda.device_count()

    def use(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def event(self, *, is_timed: bool = False) -> Event:
        event: Event = torch.cuda.Event(enable_timing=is_timed)  # type: ignore[no-untyped-call]
        return event

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def compute_capability(self, device: torch.device) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(device)

    def product(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def free_bytes(self, device: torch.device) -> tuple[int, int]:
        free, whole = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), whole


GPU = "cuda"
"""The kind of device on which a run trains that asks for GPUs."""

ACCELERATORS: dict[str, Accelerator] = {GPU: Cuda()}
"""The accelerators by the type of their torch.device."""


def accelerator(device: torch.device) -> Accelerator | None:
    """What `device` can do besides computing; None for the host's processor."""
    return None if is_cpu(device) else ACCELERATORS[device.type]


def is_cpu(device: torch.device) -> bool:
    """Whether `device` is the host's processor."""
    return device.type == "cpu"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor number of a CUDA device's compute capability; None for any other device."""
    kind = accelerator(device)
    return None if kind is None else kind.compute_capability(device)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done everything that is queued; the host's processor queues nothing."""
    if (kind := accelerator(device)) is not None:
        kind.synchronize(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply `x`: its own, or fp32 on a CPU that multiplies 16-bit matrices slowly.

    The caller rounds the result to `x.dtype`, which gives what a kernel with fp32 accumulation gives.
    """
    return torch.float32 if is_cpu(x.device) and not CPU_MULTIPLIES.get(x.dtype, True) else x.dtype
