"""Cross-entropy of the next token, summed over scored targets, without the logits of the whole batch.

    # X = B·T positions, C positions of one chunk, R of one block of it, D model width, V vocabulary

The loss is a sum, not a mean. The divisor is the number of scored targets over all ranks and micro-batches,
so the gradient does not depend on how a batch is cut.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt.model.hardware import compute_dtype, is_cpu
from gpt.model.loss_chunks import block_elements, chunk_elements, rows_within

IGNORED = -100

BlockLoss = Callable[[Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor]]


def cross_entropy_sum(
    hidden_xd: Tensor,
    weight_vd: Tensor,
    targets_x: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    compiled: BlockLoss | None = None,
) -> Tensor:
    """Sum in nats, fp32, of -log p(target) over the targets that are not IGNORED.

    p is the softmax of hidden · weightᵀ, with `softcap` capped to c · tanh(x / c). `z_loss` is the weight of
    (log Z)² (PaLM, arXiv:2204.02311, section 5). The forward pass also computes the gradient, chunk by chunk,
    and writes it over the logits: at most `chunk_rows` × V logits exist at a time, in the dtype of the
    products, and none is computed twice. `compiled` is `block_loss`, compiled.
    """
    dtype, vocabulary = compute_dtype(hidden_xd), len(weight_vd)
    rows = chunk_rows or rows_within(chunk_elements(is_bf16=dtype == torch.bfloat16), vocabulary)
    block_rows = rows_within(block_elements(is_cpu=is_cpu(hidden_xd.device)), vocabulary)
    options = (softcap, z_loss, rows, block_rows, torch.is_grad_enabled(), compiled or block_loss)
    loss: Tensor = _CrossEntropySum.apply(hidden_xd, weight_vd, targets_x, *options)  # type: ignore[no-untyped-call]
    return loss


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c · tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2), or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def block_loss(
    logits_rv: Tensor, index_r: Tensor, softcap: float | None, z_loss: float, is_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss [R] of a block for the ids `index_r`, and the gradient at the targets [R, 1].

    d(log Z)/dx = softmax(x), so d loss/dx = (1 + 2 z log Z) softmax(x) − onehot(target), times 1 − tanh² with
    a cap. The first term overwrites the logits; the second result is the whole gradient at the targets. The
    caller writes it there, because inductor (torch 2.13) on one thread reorders an indexed write and another
    pass. Without `is_gradient` neither is computed. A pass over [R, V] costs as much as the products, so
    passes that change nothing are skipped.
    """
    x_rv = capped(logits_rv.float(), softcap)
    log_p_rv = x_rv.log_softmax(-1)
    nats_r1 = -log_p_rv.gather(1, index_r[:, None])
    target_r1 = x_rv.gather(1, index_r[:, None])
    log_z_r1 = target_r1 + nats_r1
    loss_r = (nats_r1 + z_loss * log_z_r1.square())[:, 0]
    if not is_gradient:
        return loss_r, target_r1
    factor_r1 = 1 + 2 * z_loss * log_z_r1
    d_target_r1 = factor_r1 * (-nats_r1).exp() - 1
    d_rv = log_p_rv.exp_()
    if z_loss:
        d_rv = d_rv * factor_r1
    if softcap is not None:  # c · tanh(x / c)
        d_rv = d_rv * (1 - (x_rv / softcap).square())
        d_target_r1 = d_target_r1 * (1 - (target_r1 / softcap).square())
    logits_rv.copy_(d_rv)
    return loss_r, d_target_r1.to(logits_rv.dtype)


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
        block_rows: int,
        is_grad_enabled: bool,
        block_loss: BlockLoss,
    ) -> Tensor:
        needs_grad = [is_grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        dtype = compute_dtype(hidden_xd)
        hidden, weight = hidden_xd.to(dtype), weight_vd.to(dtype)
        d_hidden = torch.empty_like(hidden_xd) if needs_grad[0] else None
        d_weight: Tensor | None = None
        is_one_chunk = len(hidden) <= chunk_rows
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            is_scored_c = targets_x[rows] != IGNORED
            index_c = targets_x[rows].where(is_scored_c, 0)
            # Mask rows that are not scored here, where they are D wide and not V.
            chunk_cd = hidden[rows] * is_scored_c[:, None]
            logits_cv = chunk_cd @ weight.t()
            for first in range(0, len(logits_cv), block_rows):
                block = slice(first, first + block_rows)
                logits_rv, index_r = logits_cv[block], index_c[block]
                loss_r, d_target_r1 = block_loss(logits_rv, index_r, softcap, z_loss, any(needs_grad))
                loss += loss_r.where(is_scored_c[block], 0.0).sum()
                if any(needs_grad):
                    logits_rv.scatter_(1, index_r[:, None], d_target_r1)
            d_logits_cv = logits_cv
            if d_hidden is not None:
                d_hidden[rows] = (d_logits_cv @ weight) * is_scored_c[:, None]
            if not needs_grad[1]:
                continue
            if is_one_chunk and dtype == weight_vd.dtype != torch.float16:
                d_weight = d_logits_cv.t() @ chunk_cd
                continue
            if d_weight is None:
                d_weight = torch.zeros_like(weight_vd, dtype=torch.float32)
            if dtype == torch.float32:
                torch.addmm(d_weight, d_logits_cv.t(), chunk_cd, out=d_weight)
            else:
                d_weight += d_logits_cv.t() @ chunk_cd
        # A sum over many tokens may exceed the largest fp16 number before the backward pass divides it.
        if d_weight is not None and weight_vd.dtype != torch.float16:
            d_weight = d_weight.to(weight_vd.dtype)
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), weight_vd.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (d_loss,) = d_losses
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward scales the gradient in place, so it runs only once"
        d_hidden, d_weight = (None if g is None else g.mul_(d_loss) for g in gradients)
        return d_hidden, None if d_weight is None else d_weight.to(ctx.dtype), *[None] * 7
