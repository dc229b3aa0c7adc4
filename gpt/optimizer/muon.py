"""Muon for the matrices inside the blocks, AdamW for everything else, under any ZeRO stage.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal matrix. DeepSpeed's own Muon orthogonalises before gradient clipping at some stages and after it at
others; this one always follows torch.optim.Muon.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gpt.config.optimizer import OptimizerConfig
from gpt.optimizer.adamw import AdamW
from gpt.optimizer.whole_matrices import MatrixExchange

# The quintic with the largest slope at zero (Jordan et al. 2024), applied five times.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U Vᵀ for a matrix U S Vᵀ, with singular values between 0.7 and 1.2, in the dtype of `matrix`."""
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def rate_factor(rows: int, columns: int) -> float:
    """The factor that gives a matrix's update the size of AdamW's, so that one rate and decay serve both.

    0.2 · √max(rows, columns): the root mean square of AdamW's updates (Moonlight, arXiv:2502.16982,
    section 2.2).
    """
    return 0.2 * math.sqrt(max(rows, columns))


def scaled_update(momentum: Tensor) -> Tensor:
    """What Muon subtracts from a matrix with this momentum, at a learning rate of 1."""
    return orthogonalized(momentum).mul_(rate_factor(*momentum.shape))


class MuonAdamW(AdamW):
    """Muon on the groups that have a `momentum`, AdamW on the others.

    Matrices are sent and orthogonalised in `dtype`, except fp16: its range is too small for the momentum of
    a large network, so bf16 takes its place.
    """

    def __init__(self, groups: list[dict[str, Any]], optimizer: OptimizerConfig, dtype: torch.dtype) -> None:
        super().__init__(groups, optimizer, dtype)
        self._matrix_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        self._exchanges: dict[Tensor, MatrixExchange] = {}

    def use_exchange(self, parameter: Tensor, exchange: MatrixExchange) -> None:
        """Update `parameter` by Muon, with whole matrices from `exchange`."""
        self._exchanges[parameter] = exchange

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Collective where ZeRO has cut parameters."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    self._update(parameter, group)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The momentum of a parameter that Muon updates; AdamW's state of any other."""
        if parameter not in self._exchanges:
            return super().new_state(parameter)
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=self._dtype)}

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        kept, gradient, momentum = state["momentum_buffer"], parameter.grad, group["momentum"]
        assert gradient is not None
        buffer = kept.float().lerp_(gradient, 1 - momentum)  # `kept` itself when it is fp32
        kept.copy_(buffer)
        nesterov = gradient.lerp(buffer, momentum)
        updates = self._exchanges[parameter].apply(scaled_update, nesterov.to(self._matrix_dtype))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(updates.to(parameter.dtype), alpha=group["lr"])
