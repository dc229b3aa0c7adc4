"""How the ranks are arranged: one dimension for each way in which they share the work.

Ranks that differ in the `data` coordinate train on different sequences. Ranks that differ only in another
coordinate work on the same sequences. Later dimensions vary faster, so their groups are neighbouring ranks,
which usually share a node.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

DATA = "data"
SEQUENCE = "sequence"


@dataclass(frozen=True)
class Mesh:
    """The size of each dimension, slowest first; their product is the world size."""

    sizes: Mapping[str, int]

    @classmethod
    def over(cls, world_size: int, **shared: int) -> "Mesh":
        """All ranks in `data` and the `shared` dimensions; `data` gets what the others leave."""
        others = prod(shared.values())
        assert world_size % others == 0, f"{world_size} processes do not fill a mesh of {shared}"
        return cls({DATA: world_size // others, **shared})

    def size(self, dimension: str) -> int:
        """The number of ranks along `dimension`; 1 when the mesh does not have it."""
        return self.sizes.get(dimension, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of `rank` in every dimension."""
        found = {}
        for dimension, size in reversed(list(self.sizes.items())):
            rank, found[dimension] = divmod(rank, size)
        return found

    def groups(self, dimension: str) -> list[list[int]]:
        """The groups of ranks that differ in `dimension` alone, in the order of their first ranks."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, position in enumerate(product(*map(range, self.sizes.values()))):
            others = tuple(at for name, at in zip(self.sizes, position, strict=True) if name != dimension)
            found.setdefault(others, []).append(rank)
        return list(found.values())

    def is_first_outside(self, rank: int, dimension: str) -> bool:
        """Whether `rank` is at position 0 in every dimension except `dimension`."""
        return not any(at for name, at in self.coordinates(rank).items() if name != dimension)
