"""Which rank's file holds which part of a group's state: placements, as closed forms.

The state of an optimizer group is one flat logical vector: its parameters one after the other, each in
row-major order. A placement distributes that vector over the ranks. It knows the shapes of the parameters, so
a placement that cuts matrices by columns is one more class in PLACEMENTS; files and readers stay as they are.
A rank's file holds what the rank owns in logical order. Nothing here grows with parameters × ranks.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from math import prod

Kind = str  # a key of PLACEMENTS; checkpoint.json stores it as `layout`
Shape = tuple[int, ...]
Region = Sequence[tuple[int, int]]  # first index and end in each dimension of a parameter


@dataclass(frozen=True)
class Stretch:
    """`length` elements of a group's state in the file of `rank`, from its element `offset` on."""

    rank: int
    offset: int
    length: int


class Placement(ABC):
    """How one group's state is distributed over `world_size` ranks."""

    def __init__(self, world_size: int, shapes: Sequence[Shape], partition_numel: int) -> None:
        """`shapes` are those of the group's parameters in order. Raises ValueError when they do not fit."""
        self.world_size, self.shapes, self.partition_numel = world_size, tuple(shapes), partition_numel
        self.starts = list(accumulate((prod(shape) for shape in self.shapes), initial=0))
        self.numel = self.starts[-1]

    @abstractmethod
    def extents(self, rank: int) -> Sequence[tuple[int, int]]:
        """Logical start and end of what `rank` owns, in the order of its file; padding is left out."""

    @abstractmethod
    def locate(self, start: int, end: int) -> Iterator[Stretch]:
        """Where the logical range `start` to `end` is stored, in order."""

    def owned_numel(self, rank: int) -> int:
        """The number of elements that `rank` owns."""
        return sum(end - start for start, end in self.extents(rank))


class FlatPlacement(Placement):
    """ZeRO stages 1 and 2: the whole vector is cut into parts of `partition_numel`, one for each rank."""

    def __init__(self, world_size: int, shapes: Sequence[Shape], partition_numel: int) -> None:
        super().__init__(world_size, shapes, partition_numel)
        if partition_numel * world_size < self.numel:
            raise ValueError(f"{world_size} parts of {partition_numel} do not hold {self.numel} elements")

    def extents(self, rank: int) -> list[tuple[int, int]]:
        """See Placement; one range."""
        start = min(rank * self.partition_numel, self.numel)
        return [(start, min(start + self.partition_numel, self.numel))]

    def locate(self, start: int, end: int) -> Iterator[Stretch]:
        """See Placement."""
        position = start
        while position < end:
            rank, offset = divmod(position, self.partition_numel)
            length = min(end - position, self.partition_numel - offset)
            yield Stretch(rank, offset, length)
            position += length


class ShardedPlacement(Placement):
    """ZeRO stage 3: each parameter is flattened and cut into equal parts, one for each rank."""

    def __init__(self, world_size: int, shapes: Sequence[Shape], partition_numel: int) -> None:
        super().__init__(world_size, shapes, partition_numel)
        self._numels = [prod(shape) for shape in self.shapes]
        self._offsets = cache(self._offsets_of)
        self._counts = Counter(self._numels)  # a network has few sizes

    def extents(self, rank: int) -> list[tuple[int, int]]:
        """See Placement; one range for each parameter."""
        return [
            (first + low, first + high)
            for first, numel in zip(self.starts, self._numels, strict=False)
            for low, high in [self._shard(numel, rank)]
        ]

    def locate(self, start: int, end: int) -> Iterator[Stretch]:
        """See Placement."""
        position = start
        while position < end:
            index = bisect_right(self.starts, position) - 1
            within = position - self.starts[index]
            rank = within // -(-self._numels[index] // self.world_size)
            low, high = self._shard(self._numels[index], rank)
            length = min(end - position, high - within)
            yield Stretch(rank, self._offsets(rank)[index] + within - low, length)
            position += length

    def owned_numel(self, rank: int) -> int:
        """See Placement; one term for each size."""
        shards = ((self._shard(numel, rank), count) for numel, count in self._counts.items())
        return sum((high - low) * count for (low, high), count in shards)

    def _shard(self, numel: int, rank: int) -> tuple[int, int]:
        size = -(-numel // self.world_size)
        return min(rank * size, numel), min((rank + 1) * size, numel)

    def _offsets_of(self, rank: int) -> list[int]:
        """Where each parameter's shard begins in the file of `rank`."""
        shards = (self._shard(numel, rank) for numel in self._numels)
        return list(accumulate((high - low for low, high in shards), initial=0))


PLACEMENTS: dict[Kind, Callable[[int, Sequence[Shape], int], Placement]] = {
    "flat": FlatPlacement,
    "sharded": ShardedPlacement,
}


class GroupLayout:
    """The state of one group, distributed over `world_size` ranks by the placement `kind`."""

    def __init__(
        self, kind: Kind, world_size: int, shapes: Sequence[Shape | int], partition_numel: int
    ) -> None:
        """`shapes` are those of the group's parameters; as in numpy, an int is the shape of a vector.

        Raises ValueError when `partition_numel` is too small for them.
        """
        full = [(shape,) if isinstance(shape, int) else shape for shape in shapes]
        self.placement = PLACEMENTS[kind](world_size, full, partition_numel)
        self.extents, self.locate = self.placement.extents, self.placement.locate
        self.owned_numel = self.placement.owned_numel


def region_ranges(shape: Shape, region: Region) -> Iterator[tuple[int, int]]:
    """The row-major ranges of elements that a `region` of a tensor covers, in order and as few as can be."""
    if not shape:
        yield 0, 1
        return
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    last = len(shape) - 1
    while last > 0 and tuple(region[last]) == (0, shape[last]):  # whole rows belong to one range
        last -= 1
    first, end = region[last]
    for outer in product(*(range(low, high) for low, high in region[:last])) if first < end else ():
        base = sum(index * stride for index, stride in zip(outer, strides, strict=False))
        yield base + first * strides[last], base + end * strides[last]
