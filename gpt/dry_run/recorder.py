"""What a step does on the fake device: host waits, collectives, kernels, and memory at its peak."""

import collections
import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gpt.dry_run.device import DEVICE
from gpt.run.dry_step import Collective, HostWait

_PACKAGE = Path(__file__).resolve().parents[1]
_OWN = str(_PACKAGE) + "/"
_STAND_INS = (
    _OWN + "dry_run/",
    _OWN + "distributed/zero/fake_accelerator.py",
)  # they ask for nothing themselves

# What torch.distributed calls them, and which argument holds the largest buffer.
_COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::alltoall_": ("all-to-all", 1),
}

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_NO_KERNELS = ("empty", "new_empty", "detach", "record_stream", "_reshape_alias", "c10d::")

Counts = collections.Counter[tuple[Any, ...]]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is dispatched to the fake device while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "build"
        self.kernels = 0
        # What kernels read and write, matrix products and the others
        self.moved_bytes: collections.Counter[str] = collections.Counter()
        self.live: collections.Counter[str] = collections.Counter()  # bytes by phase
        self.live_bytes = self.peak_bytes = 0
        self.peak_phase = self.phase
        self._finalizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._collectives: Counts = collections.Counter()
        self._waits: Counts = collections.Counter()

    def begin(self) -> None:
        """Forget everything except what is alive."""
        self.kernels = 0
        self.moved_bytes.clear()
        self.peak_bytes = self.live_bytes
        self._collectives.clear()
        self._waits.clear()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Attribute what is allocated inside to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def wait(self, reason: str) -> None:
        """Note that the host waits for the device, and the line of ours or DeepSpeed's that asks for it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            is_ours = path.startswith(_OWN)
            if (is_ours and not path.startswith(_STAND_INS)) or "/deepspeed/" in path:
                where = path.removeprefix(_OWN) if is_ours else path.rpartition("/deepspeed/")[2]
                line = f"{'gpt' if is_ours else 'deepspeed'}/{where}:{frame.f_lineno} {frame.f_code.co_name}"
                self._waits[line, reason, is_ours] += 1
                return
            frame = frame.f_back
        self._waits["unknown", reason, True] += 1

    @property
    def counts(self) -> Counts:
        """How often what happened since `begin`: kernels, collectives and host waits."""
        counts: Counts = collections.Counter({("kernel",): self.kernels})
        counts.update(self._collectives)
        counts.update(self._waits)
        return counts

    def repeat(self, earlier: Counts, later: Counts, times: int) -> None:
        """Count what happened between two `counts` another `times` times."""
        for key, count in later.items():
            more = times * (count - earlier[key])
            if key == ("kernel",):
                self.kernels += more
            elif key in self._collectives:
                self._collectives[key] += more
            else:
                self._waits[key] += more

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives since `begin`, equal ones together, in the order of their first appearance."""
        return tuple(Collective(key[0], key[1], key[2], count) for key, count in self._collectives.items())

    @property
    def host_waits(self) -> tuple[HostWait, ...]:
        """The host waits since `begin`."""
        return tuple(HostWait(key[0], key[1], key[2], count) for key, count in self._waits.items())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        kwargs = kwargs or {}
        if name == "aten::_local_scalar_dense" and _is_here(args[0]):
            return self._read_number(args[0])
        if (
            name in ("aten::_to_copy", "aten::copy_")
            and (arrived := self._copied_away(name, args, kwargs)) is not None
        ):
            return arrived
        if name.startswith("c10d::"):
            self._note_collective(name, args)
        out = function(*args, **kwargs)
        written = [tensor for tensor in tree_iter(out) if _is_here(tensor)]
        for tensor in written:
            self._note_storage(tensor)
        if written and _is_kernel(function):
            read = [tensor for tensor in tree_iter((args, kwargs)) if _is_here(tensor)]
            self.kernels += 1
            kind = "products" if name in _PRODUCTS else "others"
            self.moved_bytes[kind] += sum(tensor.nbytes for tensor in (*read, *written))
        return out

    def _read_number(self, tensor: Tensor) -> bool | int | float:
        """A plausible value of a scalar; integers are flags, such as that of an overflow."""
        self.wait("reads a number")
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.dtype.is_floating_point else 0

    def _copied_away(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a copy from the device to the host; None if `name` does not copy there."""
        source: Tensor
        target: Tensor | None
        if name == "aten::copy_":
            target, source = args[0], args[1]
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, device = args[0], torch.device(kwargs.get("device") or args[0].device)
            blocks = not kwargs.get("non_blocking", False)
            target = source if device.type == DEVICE.type else None
        if not _is_here(source) or (target is not None and _is_here(target)):
            return None
        if blocks:
            self.wait("copies to the host")
        if target is None:
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return target

    def _note_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._finalizers:
            return
        size = storage.nbytes()
        self.live[self.phase] += size
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.live_bytes, self.phase
        self._finalizers[storage] = weakref.finalize(storage, self._free, self.phase, size)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Count `tensors` no longer."""
        for tensor in tensors:
            self._finalizers.pop(tensor.untyped_storage())()

    def _free(self, phase: str, size: int) -> None:
        self.live[phase] -= size
        self.live_bytes -= size

    def _note_collective(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _COLLECTIVES:
            return
        operation, buffer = _COLLECTIVES[name]
        size = sum(t.nbytes for t in tree_iter(args[buffer]) if isinstance(t, Tensor))
        group = next(a for a in args if isinstance(a, torch.ScriptObject))
        self._collectives[operation, dist.ProcessGroup.unbox(group).size(), size] += 1


def _is_kernel(function: Any) -> bool:
    """Whether the device computes: not for a view, nor for memory without values."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    return not is_view and not function._schema.name.removeprefix("aten::").startswith(_NO_KERNELS)


def _is_here(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE.type


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors` on the fake device, each counted once."""
    storages = {id(s): s for t in tensors if _is_here(t) for s in [t.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())
