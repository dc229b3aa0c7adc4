"""Muon for the matrices inside the blocks, AdamW for everything else, under any ZeRO stage.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one, which needs the matrix whole, while ZeRO cuts it. So each step sends the pieces of every
matrix to one rank, which owns it, and the pieces of the result back: each matrix is computed once, and the
numbers are those of a single process. DeepSpeed's own Muon orthogonalises before the gradient is clipped at
some stages and after it at others; this one always follows torch.optim.Muon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.config.optimizer import OptimizerConfig
from gpt.optimizer.adamw import AdamW

# The quintic whose slope at zero is largest (Jordan et al. 2024), five times.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U Vᵀ for a matrix U S Vᵀ, its singular values between 0.7 and 1.2, in the dtype of `matrix`."""
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def rate_factor(rows: int, columns: int) -> float:
    """What a matrix's update is scaled by, so that AdamW's rate and decay serve both.

    0.2 · √max(rows, columns): the root mean square of AdamW's updates (Moonlight, arXiv:2502.16982,
    section 2.2).
    """
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Whole:
    """One parameter of a partition: the matrices that are stacked in it, and where its pieces lie.

    A piece (rank, at, length) is at element `at` of that rank's partition; pieces are in the order of the
    parameter.
    """

    rows: tuple[int, ...]
    columns: int
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def cost(self) -> int:
        """Multiplications of one iteration, up to a factor."""
        return sum(rows * self.columns * min(rows, self.columns) for rows in self.rows)

    def update(self, momentum: Tensor) -> Tensor:
        """The update of each stacked matrix, flat as `momentum`, which has `self`'s elements."""
        stacked = momentum.view(-1, self.columns)
        parts = [
            orthogonalized(part).mul_(rate_factor(*part.shape))
            for part in torch.split(stacked, list(self.rows))
        ]
        return torch.cat(parts).reshape(-1)


class Exchange:
    """Sends the pieces of whole parameters to their owners and the results back."""

    def __init__(self, wholes: Sequence[Whole], rank: int, world_size: int) -> None:
        self._rank = rank
        loads = [0] * world_size
        owners: dict[int, int] = {}
        for i in sorted(range(len(wholes)), key=lambda i: (-wholes[i].cost, i)):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += wholes[i].cost
        self._owned = [whole for i, whole in enumerate(wholes) if owners[i] == rank]
        # In the order of (owner, parameter): what this rank holds of each
        self._held = [
            [piece for i, whole in enumerate(wholes) if owners[i] == owner for piece in whole.pieces]
            for owner in range(world_size)
        ]

    def updates(self, momentum: Tensor) -> Tensor:
        """What Muon subtracts from this rank's partition, for the same part of its momentum."""
        mine = [[(at, n) for rank, at, n in pieces if rank == self._rank] for pieces in self._held]
        sent_sizes = [sum(n for _, n in pieces) for pieces in mine]
        sent = torch.cat([momentum[at : at + n] for pieces in mine for at, n in pieces] or [momentum[:0]])
        received_sizes = [
            sum(n for whole in self._owned for rank, _, n in whole.pieces if rank == source)
            for source in range(len(self._held))
        ]
        received = sent.new_empty(sum(received_sizes))
        _all_to_all(received, sent, received_sizes, sent_sizes)
        answer = torch.empty_like(received)
        starts = [sum(received_sizes[:source]) for source in range(len(received_sizes))]
        for whole in self._owned:
            places = []
            for rank, _, n in whole.pieces:
                places.append(slice(starts[rank], starts[rank] + n))
                starts[rank] += n
            update = whole.update(torch.cat([received[place] for place in places]))
            sizes = [n for _, _, n in whole.pieces]
            for place, part in zip(places, torch.split(update, sizes), strict=True):
                answer[place] = part
        back = torch.empty_like(sent)
        _all_to_all(back, answer, sent_sizes, received_sizes)
        updates = torch.zeros_like(momentum)  # padding has none
        start = 0
        for at, n in (piece for pieces in mine for piece in pieces):
            updates[at : at + n] = back[start : start + n]
            start += n
        return updates


def _all_to_all(out: Tensor, into: Tensor, out_sizes: list[int], in_sizes: list[int]) -> None:
    if len(out_sizes) == 1:
        out.copy_(into)
    else:
        dist.all_to_all_single(out, into, out_sizes, in_sizes)


class MuonAdamW(AdamW):
    """Muon on the groups that have a `momentum`, AdamW on the others.

    A group of Muon's may have parameters of ours, whole, or ZeRO's flat parts of them; what lies where in
    a part is told by `exchange`. Matrices are sent and orthogonalised in `dtype`; in bf16 where that is fp16,
    which has no numbers for the momentum of a large network.
    """

    def __init__(self, groups: list[dict[str, Any]], optimizer: OptimizerConfig, dtype: torch.dtype) -> None:
        super().__init__(groups, optimizer)
        self._exchange_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self.exchanges: dict[Tensor, Exchange] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Collective where parameters are cut."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, group)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Of Muon's parameters the momentum, of the others AdamW's state."""
        if parameter not in self.exchanges:
            return super().new_state(parameter)
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=self._dtype)}

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        kept, gradient, momentum = state["momentum_buffer"], parameter.grad, group["momentum"]
        assert gradient is not None
        buffer = kept.float().lerp_(gradient, 1 - momentum)  # where it is fp32, `kept` itself
        kept.copy_(buffer)
        ahead = gradient.lerp(buffer, momentum)  # Nesterov's
        updates = self.exchanges[parameter].updates(ahead.to(self._exchange_dtype))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(updates.to(parameter.dtype), alpha=group["lr"])
