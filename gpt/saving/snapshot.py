"""The source of a save: a copy of this rank's state in host memory, or the state itself."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.distributed.zero.state import StatePart
from gpt.model.hardware import accelerator

_BLOCK_NUMEL = 1 << 24  # elements of a device's state that are in host memory at a time: 64 MiB


class Snapshot:
    """A host buffer for the state of one rank, in the order of its file; allocated once."""

    def __init__(self, numel: int, device: torch.device) -> None:
        gpu = accelerator(device)  # it copies asynchronously only to pinned memory
        dtype = torch.float32
        self._buffer = gpu.pinned(numel, dtype) if gpu is not None else torch.empty(numel, dtype=dtype)
        self._buffer.zero_()  # touch every page now, or a step would wait for the kernel to provide it
        self._copying = gpu.event(is_timed=True) if gpu is not None else None
        self._copied = gpu.event(is_timed=True) if gpu is not None else None

    def take(self, state: Iterator[StatePart]) -> None:
        """Copy `state`; on a GPU this only queues the copy, ahead of later steps on the same stream."""
        if self._copying is not None:
            self._copying.record()
        end = 0
        for part in state:
            start, end = end, end + part.tensor.numel()
            self._buffer[start:end].copy_(part.tensor, non_blocking=True)
        assert end == self._buffer.numel(), f"{end} of {self._buffer.numel()} elements"
        if self._copied is not None:
            self._copied.record()

    def device_seconds(self) -> float:
        """How long the device was busy with the last copy, once that is complete."""
        if self._copying is None or self._copied is None:
            return 0.0
        return float(self._copying.elapsed_time(self._copied)) / 1000.0

    def parts(self) -> Iterator[NDArray[np.float32]]:
        """The content, after waiting until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        yield self._buffer.numpy()


def live_parts(state: Iterator[StatePart]) -> Iterator[NDArray[np.float32]]:
    """The content of `state` itself, block by block; nothing may change it until the last block is read."""
    for part in state:
        for block in torch.split(part.tensor, _BLOCK_NUMEL):
            yield block.float().cpu().numpy()
