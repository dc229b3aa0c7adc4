"""The source of a save: a copy of this rank's state in host memory, or the state itself."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.distributed.device_copies import pin, side_stream
from gpt.distributed.zero.state import StatePart
from gpt.model.hardware import Event

_BLOCK_NUMEL = 1 << 24  # elements of a device's state that are in host memory at a time: 64 MiB


class Snapshot:
    """A host buffer for the state of one rank, in the order of its file; allocated once for the process.

    A GPU copies beside the steps, on a stream of its own. Only the next update waits for it (`hold_update`).
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._buffer = torch.empty(numel, dtype=torch.float32)
        self._stream = side_stream(device)
        self._copied: Event | None = None
        self._held: tuple[Event, Event] | None = None  # around the wait of an update
        if self._stream is None:
            self._buffer.zero_()  # touch every page now, or a step would wait for the kernel to provide it
        elif (problem := pin(self._buffer)) is not None:  # a GPU copies asynchronously to pinned memory only
            print(
                f"warning: steps wait for the copy of each save, which is not pinned: {problem}", flush=True
            )

    def take(self, state: Iterator[StatePart]) -> None:
        """Copy `state`; on a GPU this only queues the copy, and the next update must `hold_update` first."""
        if self._stream is None:
            self._copy(state)
            return
        self._held = None
        self._stream.after_compute()
        with self._stream.copying():
            self._copy(state)
        self._copied = self._stream.mark()

    @property
    def is_queued(self) -> bool:
        """Whether a copy may still be reading the state."""
        return self._copied is not None

    def hold_update(self) -> None:
        """Let what is queued next on the GPU wait for the copy."""
        assert self._stream is not None and self._copied is not None
        before = self._stream.mark_compute()
        self._stream.hold_compute(self._copied)
        self._held = before, self._stream.mark_compute()

    def device_seconds(self) -> float:
        """How long an update waited for the last copy; 0 if that is not known yet."""
        if self._held is None or not self._held[1].query():
            return 0.0
        before, after = self._held
        return float(before.elapsed_time(after)) / 1000.0

    def parts(self) -> Iterator[NDArray[np.float32]]:
        """The content, after waiting until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        yield self._buffer.numpy()

    def _copy(self, state: Iterator[StatePart]) -> None:
        end = 0
        for part in state:
            start, end = end, end + part.tensor.numel()
            self._buffer[start:end].copy_(part.tensor, non_blocking=True)
        assert end == self._buffer.numel(), f"{end} of {self._buffer.numel()} elements"


def live_parts(state: Iterator[StatePart]) -> Iterator[NDArray[np.float32]]:
    """The content of `state` itself, block by block; nothing may change it until the last block is read."""
    for part in state:
        for block in torch.split(part.tensor, _BLOCK_NUMEL):
            yield block.float().cpu().numpy()
