"""torch's meta device, whose tensors have shapes but no memory, in the place of a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gpt.model.hardware import ACCELERATORS, Event

DEVICE = torch.device("meta")

Waited = Callable[[str], None]


class Stream:
    """A queue of the device; what waits on the host is reported."""

    def __init__(self, waited: Waited) -> None:
        self._waited = waited

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        self._waited("waits for a stream")

    def wait_stream(self, other: "Stream") -> None:
        """Let the device wait for another queue, not the host."""

    def wait_event(self, event: "StreamEvent") -> None:
        """Let the device wait for an event, not the host."""

    def query(self) -> bool:
        """Whether the queue is empty."""
        return True


class StreamEvent:
    """A point in a queue; waiting for it on the host is reported."""

    def __init__(self, waited: Waited) -> None:
        self._waited = waited

    def record(self, stream: Stream | None = None) -> None:
        """Place the event at the end of `stream`."""

    def synchronize(self) -> None:
        """Wait until the device has reached the event."""
        self._waited("waits for an event, unless it has been reached")

    def wait(self, stream: Stream | None = None) -> None:
        """Let the device wait for the event, not the host."""

    def query(self) -> bool:
        """Whether the device has reached the event; never, so that nothing relies on it."""
        return False

    def elapsed_time(self, end: Any) -> float:  # noqa: ARG002
        """Milliseconds from this event to `end`."""
        return 1.0


class FakeGpu:
    """What gpt.model.hardware asks of a kind of device."""

    backend = "fake"

    def __init__(self, waited: Waited, capability: tuple[int, int], product: str) -> None:
        self._waited, self._capability, self._product = waited, capability, product

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def use(self, device: torch.device) -> None:
        pass

    def synchronize(self, device: torch.device) -> None:  # noqa: ARG002
        self._waited("waits for the device")

    def event(self, *, is_timed: bool = False) -> Event:  # noqa: ARG002
        return StreamEvent(self._waited)

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def compute_capability(self, device: torch.device) -> tuple[int, int] | None:  # noqa: ARG002
        return self._capability

    def product(self, device: torch.device) -> str:  # noqa: ARG002
        return self._product

    def free_bytes(self, device: torch.device) -> tuple[int, int]:  # noqa: ARG002
        return 1 << 37, 1 << 37


@contextlib.contextmanager
def used_as_gpu(waited: Waited, capability: tuple[int, int], product: str) -> Iterator[FakeGpu]:
    """The device as one of gpt.model.hardware's accelerators, inside a `with`.

    Casts of a whole module do nothing, because tensors without memory cannot be cast in place; the module is
    built in its final dtype.
    """
    gpu = FakeGpu(waited, capability, product)

    def itself(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return module

    with contextlib.ExitStack() as changes:
        changes.enter_context(patch.dict(ACCELERATORS, {DEVICE.type: gpu}))
        for cast in ("to", "bfloat16", "half", "float"):
            changes.enter_context(patch.object(nn.Module, cast, itself))
        changes.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        yield gpu
