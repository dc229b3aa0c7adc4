"""Gives an optimizer whole matrices after ZeRO has cut its parameters into fragments.

An update such as Muon's needs a matrix as a whole. Every step therefore sends the fragments of each parameter
to one rank, its owner, and the fragments of the result back: each matrix is computed once, and the numbers
are those of a single process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MatrixRule = Callable[[Tensor], Tensor]
"""One matrix [rows, columns] → its update, of the same shape"""


class Fragment(NamedTuple):
    """Consecutive elements of a parameter: `length` of them, from element `start` of a rank's partition."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True)
class ShardedMatrices:
    """One parameter: the matrices that are stacked in it, and its fragments in the parameter's order."""

    rows: tuple[int, ...]
    columns: int
    fragments: tuple[Fragment, ...]

    @property
    def cost(self) -> int:
        """Multiplications of the product of each matrix with its own transpose."""
        return sum(rows * self.columns * min(rows, self.columns) for rows in self.rows)

    def apply(self, rule: MatrixRule, flat: Tensor) -> Tensor:
        """`rule` of each stacked matrix; `flat` and the result hold the parameter's elements in order."""
        matrices = torch.split(flat.view(-1, self.columns), list(self.rows))
        return torch.cat([rule(matrix) for matrix in matrices]).reshape(-1)


class MatrixExchange:
    """Sends the fragments of parameters to their owners, and the results back. Its methods are collective."""

    def __init__(self, parameters: Sequence[ShardedMatrices], rank: int, world_size: int) -> None:
        owners = _owners(parameters, world_size)
        self._rank = rank
        self._owned = [
            parameter for parameter, owner in zip(parameters, owners, strict=True) if owner == rank
        ]
        self._fragments_by_owner = [
            [
                fragment
                for parameter, its_owner in zip(parameters, owners, strict=True)
                if its_owner == owner
                for fragment in parameter.fragments
            ]
            for owner in range(world_size)
        ]

    def apply(self, rule: MatrixRule, partition: Tensor) -> Tensor:
        """`rule` of every matrix, given and returned as this rank's partition; padding becomes zero."""
        mine = [
            [fragment for fragment in fragments if fragment.rank == self._rank]
            for fragments in self._fragments_by_owner
        ]
        sent_sizes = [sum(fragment.length for fragment in fragments) for fragments in mine]
        # Sorted by owner, so that each rank's share is contiguous
        slices = [slice(start, start + n) for fragments in mine for _, start, n in fragments]
        sent = torch.cat([partition[part] for part in slices] or [partition[:0]])
        received_sizes = [
            sum(n for parameter in self._owned for rank, _, n in parameter.fragments if rank == source)
            for source in range(len(self._fragments_by_owner))
        ]
        received = sent.new_empty(sum(received_sizes))
        _all_to_all(received, sent, received_sizes, sent_sizes)
        results = self._apply_to_owned(rule, received, received_sizes)
        returned = torch.empty_like(sent)
        _all_to_all(returned, results, sent_sizes, received_sizes)
        updates = torch.zeros_like(partition)
        lengths = [part.stop - part.start for part in slices]
        for part, update in zip(slices, torch.split(returned, lengths), strict=True):
            updates[part] = update
        return updates

    def _apply_to_owned(self, rule: MatrixRule, received: Tensor, sizes: list[int]) -> Tensor:
        """The results of this rank's own parameters, laid out as their fragments came, rank after rank."""
        results = torch.empty_like(received)
        starts = [sum(sizes[:source]) for source in range(len(sizes))]
        for parameter in self._owned:
            slices = []
            for rank, _, n in parameter.fragments:
                slices.append(slice(starts[rank], starts[rank] + n))
                starts[rank] += n
            update = parameter.apply(rule, torch.cat([received[part] for part in slices]))
            lengths = [fragment.length for fragment in parameter.fragments]
            for part, fragment_update in zip(slices, torch.split(update, lengths), strict=True):
                results[part] = fragment_update
        return results


def _owners(parameters: Sequence[ShardedMatrices], world_size: int) -> list[int]:
    """The rank that computes each parameter: the costliest first, each to the rank with the least work."""
    work = [0] * world_size
    owners = [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: (-parameters[i].cost, i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += parameters[i].cost
    return owners


def _all_to_all(out: Tensor, into: Tensor, out_sizes: list[int], in_sizes: list[int]) -> None:
    if len(out_sizes) == 1:
        out.copy_(into)
    else:
        dist.all_to_all_single(out, into, out_sizes, in_sizes)
