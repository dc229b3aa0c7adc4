"""Copies between the host and a GPU, beside the stream on which the GPU computes. CPUs need none of this."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt.model.hardware import Cuda, Event, accelerator


def use_in_this_thread(device: torch.device) -> None:
    """Make `device` the current one of the calling thread, before that thread touches CUDA.

    A new thread starts on GPU 0. Its first call of CUDA would open a context there, half a GiB for each rank.
    """
    if (kind := accelerator(device)) is not None:
        kind.use(device)


class SideStream:
    """A stream of a GPU for copies, and what orders it with the current stream, which computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after_compute(self) -> None:
        """Let later copies wait for everything that is queued on the current stream so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Queue what is called inside on this stream."""
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Event:
        """An event that is complete once the copies queued so far are."""
        return self._event(self._stream)

    def mark_compute(self) -> Event:
        """An event that is complete once everything queued on the current stream so far is."""
        return self._event(torch.cuda.current_stream(self._device))

    def hold_compute(self, copied: Event, *tensors: Tensor) -> None:
        """Let what is queued next on the current stream wait for `copied`; the host does not wait.

        `tensors` were allocated for this stream; their memory is not reused before the current one is done.
        """
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(copied)  # type: ignore[arg-type]
        for tensor in tensors:
            tensor.record_stream(compute)

    def to_device(self, pinned: Tensor) -> Tensor:
        """A copy of `pinned` on the GPU, which is complete when the next `mark` is."""
        with self.copying():
            return torch.empty_like(pinned, device=self._device).copy_(pinned, non_blocking=True)

    @staticmethod
    def pinned(size: int) -> Tensor:
        """`size` bytes of pinned host memory, uint8. torch reuses them once no queued copy needs them."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _event(self, stream: torch.cuda.Stream) -> Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


def side_stream(device: torch.device) -> SideStream | None:
    """A stream for copies to and from `device`; None on a CPU, which computes and copies in one place."""
    return SideStream(device) if isinstance(accelerator(device), Cuda) else None


def pin(buffer: Tensor) -> str | None:
    """Pin the memory of `buffer`, a CPU tensor that lives as long as the process. Why not, if that fails.

    torch's own pinned memory is rounded up to a power of two, up to twice of what is needed. Pinning provides
    every page.
    """
    code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)  # type: ignore[no-untyped-call]
    return None if int(code) == 0 else f"cudaHostRegister of {buffer.nbytes} bytes: error {int(code)}"
