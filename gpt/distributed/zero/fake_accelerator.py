"""DeepSpeed on the device of a dry run: an accelerator that works while the host goes on, as a GPU does.

Private in DeepSpeed 0.19 and used here: the object that holds the accelerator, the communication backend
`cdb`, the process groups that deepspeed.utils.groups keeps, and two functions that need other ranks or print.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from gpt.distributed.zero.engine import Engine
from gpt.distributed.zero.patches import import_deepspeed


@contextlib.contextmanager
def accelerated(device: torch.device, stream: Any, event: Any, synchronize: Any) -> Iterator[None]:
    """DeepSpeed with `device` as its accelerator, inside a `with`.

    `stream()` and `event()` make one, `synchronize()` waits for the device. The default process group must be
    a fake one: DeepSpeed forgets its groups at the end.
    """
    import_deepspeed(torch.device("cpu"))  # chooses the CPU first, for which DeepSpeed needs no compiler
    import deepspeed
    import deepspeed.comm.comm as communication
    import deepspeed.runtime.zero.linear as linear
    import deepspeed.runtime.zero.partition_parameters as parameters
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.stage3 as stage_3
    from deepspeed.accelerator import real_accelerator
    from deepspeed.utils import groups

    current = stream()
    names = {"event": event, "synchronize": synchronize, "stream": stream, "current": current}
    fake = _accelerator_class()(device, **names)
    with contextlib.ExitStack() as changes:
        changes.enter_context(patch.object(real_accelerator, "ds_accelerator", fake))
        for module in (coordinator, parameters, stage_3):  # there is no other rank to compare integers with
            changes.enter_context(patch.object(module, "assert_ints_same_as_other_ranks", lambda _: None))
        # torch has no autocast for this device; and DeepSpeed leaves its own F.linear behind after stage 3.
        changes.enter_context(patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        changes.enter_context(patch.object(linear, "_is_autocast_enabled", lambda _: False))
        changes.enter_context(patch.object(linear, "_get_autocast_dtype", lambda _: None))
        changes.enter_context(patch.object(functional, "linear", functional.linear))
        for module in _users_of("see_memory_usage"):  # it prints, and collects garbage first
            changes.enter_context(patch.object(module, "see_memory_usage", lambda *_, **__: None))
        kept = {
            name: value
            for name, value in vars(groups).items()
            if name.startswith("_") and name[1:2].isupper()
        }
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), dist_init_required=False, auto_mpi_discovery=False
        )
        try:
            yield
        finally:
            communication.cdb = None
            vars(groups).update(kept)


def shapes_only(engine: Engine) -> list[torch.Tensor]:
    """Tensors of DeepSpeed's that have no memory on a GPU either: shapes that it writes down."""
    return [tensor for group in getattr(engine._zero, "round_robin_bit16_meta", []) for tensor in group]


def _users_of(name: str) -> list[Any]:
    import sys

    return [m for key, m in list(sys.modules.items()) if key.startswith("deepspeed.") and hasattr(m, name)]


def _accelerator_class() -> Any:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class FakeAccelerator(CPU_Accelerator):  # type: ignore[misc]
        def __init__(self, device: torch.device, *, event: Any, synchronize: Any, stream: Any, current: Any):
            super().__init__()
            self._device, self._name, self._communication_backend_name = device, device.type, "fake"
            self._event, self._synchronize, self._stream, self._current = event, synchronize, stream, current

        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, *_: Any) -> str:
            return self._name

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return self._name

        def device_count(self) -> int:
            return 1

        def device(self, *_: Any) -> Any:
            return contextlib.nullcontext()

        def synchronize(self, *_: Any) -> None:
            self._synchronize()

        @property
        def Stream(self) -> Any:
            return lambda *_, **__: self._stream()

        @property
        def Event(self) -> Any:
            return lambda *_, **__: self._event()

        def stream(self, *_: Any) -> Any:
            return contextlib.nullcontext()

        def current_stream(self, *_: Any) -> Any:
            return self._current

        def default_stream(self, *_: Any) -> Any:
            return self._current

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == self._name

        def is_fp16_supported(self) -> bool:
            return True

        def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return tensor

        def is_pinned(self, *_: Any) -> bool:
            return True

        def memory_allocated(self, *_: Any) -> int:
            return 0

        max_memory_allocated = memory_allocated

        def memory_stats(self, *_: Any) -> dict[str, int]:
            return {}

    return FakeAccelerator
