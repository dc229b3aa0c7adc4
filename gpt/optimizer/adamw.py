"""AdamW with two options that torch's lacks: the initial second moment, and the moments' dtype.

Adam (Kingma & Ba 2014, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov & Hutter
2019, arXiv:1711.05101, algorithm 2); the arithmetic in fp32 is torch's own. Every update is elementwise, so
ZeRO may cut parameters anywhere without changing a number.
"""

from typing import Any

import torch
from torch import Tensor

from gpt.config.optimizer import OptimizerConfig
from gpt.optimizer.base import RunOptimizer

# Elements updated at a time when moments are in bf16: their fp32 copies then take 128 MiB at most.
_CHUNK_ELEMENTS = 2**24


class AdamW(RunOptimizer, torch.optim.AdamW):
    """torch's fused AdamW, over groups that each carry a name and a weight decay."""

    # Without the decorator, which loads torch's compiler, as in RunOptimizer
    _step_in_fp32 = torch.optim.AdamW.step.__wrapped__  # type: ignore[attr-defined]

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        dtype: torch.dtype,  # noqa: ARG002 - the update is in fp32 whatever the network computes in
    ) -> None:
        self._starts_at_gradient = optimizer.second_moment_init == "gradient"
        self._dtype = torch.bfloat16 if optimizer.moments == "bf16" else torch.float32
        super().__init__(
            groups,
            lr=optimizer.peak_lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=self._dtype == torch.float32,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter].update(self.new_state(parameter))
        if self._dtype == torch.float32:
            self._step_in_fp32(closure)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step_in_bf16(parameter, self.state[parameter], group)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first update of `parameter`.

        GI-Adam (Kalra & Barkeshli 2024, arXiv:2406.09405) starts v at the squared first gradient. As in the
        authors' published code, the bias correction stays: v̂_1 = g² / (1 - β2), which lowers the first rates
        by √(1 - β2^t), an automatic warmup.
        """
        second = torch.zeros_like(parameter, dtype=self._dtype)
        if self._starts_at_gradient and parameter.grad is not None:
            second.copy_(parameter.grad.square())
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=self._dtype),
            "exp_avg_sq": second,
        }


def _step_in_bf16(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One AdamW update, computed in fp32, with moments that are kept in bf16 as in DeepSeek-V3.

    arXiv:2412.19437, section 3.3.2, reports no observable effect on the loss. The config limits β2, so that
    bf16 does not round away what a step adds to v.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    state["step"] += 1
    correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    assert parameter.grad is not None
    flats = (parameter.view(-1), parameter.grad.view(-1), state["exp_avg"].view(-1))
    for start in range(0, parameter.numel(), _CHUNK_ELEMENTS):
        part = slice(start, start + _CHUNK_ELEMENTS)
        weight, gradient, kept_first = (flat[part] for flat in flats)
        kept_second = state["exp_avg_sq"].view(-1)[part]
        first = kept_first.float().lerp_(gradient, 1 - beta1)
        second = kept_second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        kept_first.copy_(first)
        kept_second.copy_(second)
        weight.mul_(1 - lr * group["weight_decay"])
        denominator = (second / correction2).sqrt_().add_(group["eps"])
        weight.sub_((first / correction1).div_(denominator), alpha=lr)
