"""Who owns which part of a group's state, as closed forms: the map between a run's logic and its files.

The state of an optimizer group is one flat logical vector: its parameters one after the other. Stages 1
and 2 cut the vector into equal parts, one a rank ("flat"); stage 3 cuts each parameter into equal parts
("sharded"). A rank's file holds what it owns in logical order. Nothing here grows with parameters × ranks.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["flat", "sharded"]


@dataclass(frozen=True)
class Piece:
    """A stretch of a group's state in one rank's file: `length` elements from `offset` on."""

    rank: int
    offset: int
    length: int


class GroupLayout:
    """The cut of one group over `world_size` ranks; `numels` are the sizes of its parameters in order."""

    def __init__(self, kind: Kind, world_size: int, numels: Sequence[int], partition_numel: int) -> None:
        self.kind, self.world_size, self.partition_numel = kind, world_size, partition_numel
        self.numels = tuple(numels)
        self.numel = sum(numels)
        self._starts = [0]
        for numel in numels:
            self._starts.append(self._starts[-1] + numel)
        self._offsets = cache(self._offsets_of)

    def extents(self, rank: int) -> list[tuple[int, int]]:
        """Logical start and end of what `rank` owns, in the order of its file; padding left out."""
        if self.kind == "flat":
            start = min(rank * self.partition_numel, self.numel)
            return [(start, min(start + self.partition_numel, self.numel))]
        return [
            (first + low, first + high)
            for first, numel in zip(self._starts, self.numels, strict=False)
            for low, high in [self._shard(numel, rank)]
        ]

    def owned_numel(self, rank: int) -> int:
        """Elements that `rank` owns."""
        return sum(end - start for start, end in self.extents(rank))

    def locate(self, start: int, end: int) -> Iterator[Piece]:
        """Where the logical range `start` to `end` lies, in order."""
        position = start
        while position < end:
            if self.kind == "flat":
                rank = position // self.partition_numel
                first, last = self.extents(rank)[0]
                offset = position - first
            else:
                index = bisect_right(self._starts, position) - 1
                within = position - self._starts[index]
                rank = within // -(-self.numels[index] // self.world_size)
                low, high = self._shard(self.numels[index], rank)
                last = self._starts[index] + high
                offset = self._offsets(rank)[index] + within - low
            stop = min(end, last)
            yield Piece(rank, offset, stop - position)
            position = stop

    def _shard(self, numel: int, rank: int) -> tuple[int, int]:
        size = -(-numel // self.world_size)
        return min(rank * size, numel), min((rank + 1) * size, numel)

    def _offsets_of(self, rank: int) -> list[int]:
        """Where each parameter's shard begins in the file of `rank`."""
        offsets = [0]
        for numel in self.numels:
            low, high = self._shard(numel, rank)
            offsets.append(offsets[-1] + high - low)
        return offsets
