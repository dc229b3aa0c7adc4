"""Cross-entropy of the next token, summed over what is scored, without the logits of the whole batch.

# X = B·T positions, C positions of one chunk, D model width, V vocabulary

The loss is a sum, not a mean: the divisor is the count of scored targets over all ranks and
micro-batches, so that the gradient does not depend on how a batch is cut.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt.layers import compute_dtype

IGNORED = -100

ChunkLoss = Callable[[Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor, Tensor]]

# Logits that exist at a time, in fp32: 64 MiB. Fewer make the passes over the weight's gradient dominate
# (one a chunk), more save nothing.
_CHUNK_ELEMENTS = 2**24


def cross_entropy_sum(
    hidden_xd: Tensor,
    weight_vd: Tensor,
    targets_x: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    compiled: ChunkLoss | None = None,
) -> Tensor:
    """Sum in nats, fp32, of -log p(target) over the targets that are not IGNORED.

    p is the softmax of hidden · weightᵀ, capped to c · tanh(x / c) where `softcap` is given. `z_loss` adds
    that times (log Z)² (PaLM, arXiv:2204.02311, section 5). The gradient is computed in the forward pass,
    chunk by chunk: no more than `chunk_rows` × V logits exist at a time, and none is computed twice.
    `compiled` is `chunk_loss`, compiled.
    """
    rows = chunk_rows or max(1, _CHUNK_ELEMENTS // len(weight_vd))
    options = (softcap, z_loss, rows, torch.is_grad_enabled(), compiled or chunk_loss)
    loss: Tensor = _CrossEntropySum.apply(hidden_xd, weight_vd, targets_x, *options)  # type: ignore[no-untyped-call]
    return loss


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c · tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2), or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunk_loss(
    logits_cv: Tensor, index_c: Tensor, softcap: float | None, z_loss: float, is_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [C] of a chunk for the ids `index_c`, and its gradient by the logits in two parts.

    d(log Z)/dx = softmax(x), so that d loss/dx = (1 + 2 z log Z) softmax(x) − onehot(target), times 1 − tanh²
    where capped: the first term in the dtype of the logits [C, V], and the whole at the target [C, 1]. They
    are put together by the caller: on one thread inductor (torch 2.13) changes the order of an indexed write
    and another pass. Without `is_gradient` both are of no use. Passes over [C, V] cost as much as the
    products, so that none is made which changes nothing.
    """
    x_cv = capped(logits_cv.float(), softcap)
    log_p_cv = x_cv.log_softmax(-1)
    nats_c1 = -log_p_cv.gather(1, index_c[:, None])
    target_c1 = x_cv.gather(1, index_c[:, None])
    log_z_c1 = target_c1 + nats_c1
    loss_c = (nats_c1 + z_loss * log_z_c1.square())[:, 0]
    if not is_gradient:
        return loss_c, logits_cv, target_c1
    factor_c1 = 1 + 2 * z_loss * log_z_c1
    d_target_c1 = factor_c1 * (-nats_c1).exp() - 1
    d_cv = log_p_cv.exp_()
    if z_loss:
        d_cv = d_cv * factor_c1
    if softcap is not None:  # c · tanh(x / c)
        d_cv = d_cv * (1 - (x_cv / softcap).square())
        d_target_c1 = d_target_c1 * (1 - (target_c1 / softcap).square())
    return loss_c, d_cv.to(logits_cv.dtype), d_target_c1.to(logits_cv.dtype)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_xd: Tensor,
        weight_vd: Tensor,
        targets_x: Tensor,
        softcap: float | None,
        z_loss: float,
        chunk_rows: int,
        is_grad_enabled: bool,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        wants = [is_grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        dtype = compute_dtype(hidden_xd)
        hidden, weight = hidden_xd.to(dtype), weight_vd.to(dtype)
        d_hidden = torch.empty_like(hidden_xd) if wants[0] else None
        d_weight = torch.zeros_like(weight_vd, dtype=torch.float32) if wants[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            is_scored_c = targets_x[rows] != IGNORED
            index_c = targets_x[rows].where(is_scored_c, 0)
            # rows that are not scored are left out here, where they are D wide and not V
            chunk_cd = hidden[rows] * is_scored_c[:, None]
            loss_c, d_logits_cv, d_target_c1 = chunk_loss(
                chunk_cd @ weight.t(), index_c, softcap, z_loss, any(wants)
            )
            loss += loss_c.where(is_scored_c, 0.0).sum()
            if any(wants):
                d_logits_cv.scatter_(1, index_c[:, None], d_target_c1)
            if d_hidden is not None:
                d_hidden[rows] = (d_logits_cv @ weight) * is_scored_c[:, None]
            if d_weight is not None and dtype == torch.float32:
                torch.addmm(d_weight, d_logits_cv.t(), chunk_cd, out=d_weight)
            elif d_weight is not None:
                d_weight += d_logits_cv.t() @ chunk_cd
        # A sum over many tokens may pass the largest fp16 number before backward divides it.
        if d_weight is not None and weight_vd.dtype != torch.float16:
            d_weight = d_weight.to(weight_vd.dtype)
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), weight_vd.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (d_loss,) = d_losses
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient is scaled in place, so that backward runs once"
        d_hidden, d_weight = (None if g is None else g.mul_(d_loss) for g in gradients)
        return d_hidden, None if d_weight is None else d_weight.to(ctx.dtype), *[None] * 6
