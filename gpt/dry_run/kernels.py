"""Fused kernels in shapes: what FlashAttention and torch's RMSNorm allocate on a GPU, without arithmetic.

On the meta device torch would take the operations apart.

# X = B·T tokens, H query heads, K key/value heads, E head width
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as functional
from torch import Tensor

from gpt.model import attention
from gpt.model.attention import Documents, Scores


class _FlashShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor) -> Tensor:
        out = torch.empty_like(q_xhe, memory_format=torch.contiguous_format)
        log_sum_exp = q_xhe.new_empty((q_xhe.shape[1], q_xhe.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(q_xhe, k_xke, v_xke, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        q_xhe, k_xke, v_xke, _, log_sum_exp = ctx.saved_tensors
        d_q = torch.empty_like(q_xhe, memory_format=torch.contiguous_format)
        summed_in_fp32, rows = torch.empty_like(d_q, dtype=torch.float32), torch.empty_like(log_sum_exp)
        if k_xke.shape[1] == q_xhe.shape[1]:
            d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_xke, v_xke))
        else:  # a gradient for each query head, then their sum
            groups = (len(q_xhe), k_xke.shape[1], -1, q_xhe.shape[2])
            d_k, d_v = (torch.empty_like(d_q).view(groups).sum(2) for _ in range(2))
        del summed_in_fp32, rows
        return d_q, d_k, d_v


def flash_shapes(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """A result of the right shape, keeping and allocating what FlashAttention-2 does."""
    del documents, scores
    out: Tensor = _FlashShapes.apply(q_xhe, k_xke, v_xke)  # type: ignore[no-untyped-call]
    return out


class _NormShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def norm_shapes(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None = None) -> Tensor:
    """A result of the right shape, keeping what torch's fused RMSNorm does."""
    del shape, eps
    out: Tensor = _NormShapes.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


@contextlib.contextmanager
def in_shapes() -> Iterator[None]:
    """RMSNorm and every kernel of attention except the reference compute shapes, inside a `with`.

    The kernels of attention all count as installed.
    """
    fused = {name: flash_shapes for name in attention.KERNELS if name != "reference"}
    with (
        patch.dict(attention.KERNELS, fused),
        patch.object(attention, "is_installed", lambda _: True),
        patch.object(functional, "rms_norm", norm_shapes),
    ):
        yield
