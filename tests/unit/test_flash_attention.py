"""The flash-attn path through the package's real Python layer, with reference kernels under its custom ops.

The package installs without its CUDA extension (see the Makefile); a stand-in for that module lets the
Python layer import, and torch.library takes CPU kernels for the two ops that it calls. So the true call,
its arguments and its autograd run here; only the GPU kernel itself is not tested.
"""

import math
import sys
import types
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.attention import Documents, Scores, choose, flash_2, reference
from gpt.config import ModelConfig


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> Iterator[None]:
    from importlib.util import find_spec

    if find_spec("flash_attn") is None:
        pytest.skip("flash-attn's Python layer is not installed")
    if find_spec("flash_attn_2_cuda") is None:
        sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
    import flash_attn.flash_attn_interface  # noqa: F401 - registers the ops

    torch.library.register_kernel("flash_attn::_flash_attn_varlen_forward", "cpu", _forward)
    torch.library.register_kernel("flash_attn::_flash_attn_varlen_backward", "cpu", _backward)
    yield


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = q @ k.transpose(1, 2) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1).float() for tensor in tensors]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    *_: object,
    **__: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert causal and dropout_p == 0.0 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    out, logsumexp = torch.empty_like(q), []
    for start, end in pairwise(bounds):
        q_, k_, v_ = _heads_first(q[start:end], k[start:end], v[start:end])
        repeats = len(q_) // len(k_)
        scores = _scores(q_, k_.repeat_interleave(repeats, 0), softmax_scale)
        logsumexp.append(scores.logsumexp(-1))
        mixed = scores.softmax(-1) @ v_.repeat_interleave(repeats, 0)
        out[start:end] = mixed.transpose(0, 1).to(q.dtype)
    return out, torch.cat(logsumexp, 1), torch.empty(0, dtype=q.dtype), torch.empty(2, dtype=torch.int64)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    *_: object,
    **__: object,
) -> Tensor:
    # FlashAttention (arXiv:2205.14135), appendix B.2: dS = P ∘ (dP − rowsum(dO ∘ O)), by formula because
    # autograd is off inside a custom op.
    bounds = cu_seqlens_q.tolist()
    for start, end in pairwise(bounds):
        q_, k_, v_, do, o = _heads_first(*(x[start:end] for x in (q, k, v, dout, out)))
        repeats = len(q_) // len(k_)
        k_, v_ = k_.repeat_interleave(repeats, 0), v_.repeat_interleave(repeats, 0)
        p = (_scores(q_, k_, softmax_scale) - softmax_lse[:, start:end, None]).exp()
        ds = p * (do @ v_.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * softmax_scale
        dq[start:end] = (ds @ k_).transpose(0, 1).to(dq.dtype)
        for target, gradient in ((dk, ds.transpose(1, 2) @ q_), (dv, p.transpose(1, 2) @ do)):
            summed = gradient.unflatten(0, (-1, repeats)).sum(1)
            target[start:end] = summed.transpose(0, 1).to(target.dtype)
    return softmax_lse.clone()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ends", [(24,), (12, 24), (1, 5, 18, 24)])
def test_flash_2_equals_the_formula_forward_and_backward(kv_heads: int, ends: tuple[int, ...]) -> None:
    documents = Documents.from_ends(np.array(ends, dtype=np.int32))
    generator = torch.Generator().manual_seed(2)
    shapes = [(24, 4, 16), (24, kv_heads, 16), (24, kv_heads, 16)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for attend in (flash_2, reference):
        qkv = [x.clone().requires_grad_() for x in inputs]
        out = attend(*qkv, documents, Scores())
        (out.float() ** 2).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, rtol=2e-2, atol=2e-2)


def test_auto_is_sdpa_on_a_cpu_and_flash_2_says_why_it_cannot_run() -> None:
    assert choose(ModelConfig(), torch.device("cpu"), torch.bfloat16)[0] == "sdpa"
    with pytest.raises(ConfigError, match=r"'flash-2' cannot run here: it needs a CUDA device, this is cpu"):
        choose(ModelConfig(attention="flash-2"), torch.device("cpu"), torch.bfloat16)
