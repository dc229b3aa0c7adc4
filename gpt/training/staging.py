"""The tensors of a step in one piece of memory, so that one copy brings them to the device."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from gpt.model.attention import Documents
from gpt.training.step import ModelInputs

_ALIGNMENT = 16  # bytes, of every tensor in the buffer


def pack(parts: Sequence[ModelInputs], allocate: Callable[[int], Tensor]) -> Tensor:
    """The tensors of `parts`, copied one after the other into the uint8 buffer that `allocate` provides."""
    tensors = list(_tensors(parts))
    buffer = allocate(sum(_room(tensor) for tensor in tensors))
    for place, tensor in zip(_places(buffer, tensors), tensors, strict=True):
        place.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, parts: Sequence[ModelInputs]) -> list[ModelInputs]:
    """`parts` with views of `buffer` for tensors; it is a copy, on any device, of what `pack` returned."""
    places = _places(buffer, list(_tensors(parts)))
    return [
        (next(places), next(places), Documents(documents.lengths, next(places), documents.longest))
        for _, _, documents in parts
    ]


def _tensors(parts: Sequence[ModelInputs]) -> Iterator[Tensor]:
    for ids, targets, documents in parts:
        yield from (ids, targets, documents.cumulative_n1)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _places(buffer: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """A view of `buffer` for each tensor, with its dtype and shape."""
    start = 0
    for tensor in tensors:
        yield buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)
