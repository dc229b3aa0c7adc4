"""FlashAttention through flash-attn's real Python layer, with reference kernels for its custom ops.

The package installs without its CUDA extension (see the Makefile). A stand-in for that module lets the Python
layer import, and torch.library registers CPU kernels for the two ops that it calls. So these tests run the
real call, its arguments and its autograd; only the GPU kernel itself is not tested.
"""

import ast
import importlib.metadata
import math
import sys
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.model.attention import (
    KERNELS,
    Attention,
    Documents,
    Scores,
    choose,
    flash_2,
    flash_3,
    flash_4,
    is_installed,
    reference,
    varlen,
)
from tests.unit.gpt.model.support import CPU, build, random_tokens


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
    assert is_installed("torch.nn.attention.varlen")  # which imports it, and so registers torch's ops
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _varlen_forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _varlen_backward)
    yield


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1).float() for tensor in tensors]


def _scores(q: Tensor, k: Tensor, scale: float, left: int, softcap: float) -> Tensor:
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
    is_hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.tensor(False))
    return scores.masked_fill(is_hidden, -math.inf)


# Arguments of the latest call of the two kernels, for the tests that check them
CALLS: dict[str, Any] = {}


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
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert window_size_right == (-1 if window_size_left < 0 else 0)
    CALLS["dropout_p"] = dropout_p
    bounds = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    out, logsumexp = torch.empty_like(q), []
    for start, end in pairwise(bounds):
        q_, k_, v_ = _heads_first(q[start:end], k[start:end], v[start:end])
        repeats = len(q_) // len(k_)
        scores = _scores(q_, k_.repeat_interleave(repeats, 0), softmax_scale, window_size_left, softcap)
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
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    # FlashAttention (arXiv:2205.14135), appendix B.2: dS = P ∘ (dP − rowsum(dO ∘ O)), by formula because
    # autograd is off inside a custom op; with a soft-cap times 1 − tanh².
    CALLS["deterministic"] = deterministic
    bounds = cu_seqlens_q.tolist()
    for start, end in pairwise(bounds):
        q_, k_, v_, do, o = _heads_first(*(x[start:end] for x in (q, k, v, dout, out)))
        repeats = len(q_) // len(k_)
        k_, v_ = k_.repeat_interleave(repeats, 0), v_.repeat_interleave(repeats, 0)
        capped = _scores(q_, k_, softmax_scale, window_size_left, softcap)
        p = (capped - softmax_lse[:, start:end, None]).exp()
        ds = p * (do @ v_.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * softmax_scale
        if softcap:
            ds = ds * (1 - (capped.masked_fill(p == 0, 0.0) / softcap) ** 2)
        dq[start:end] = (ds @ k_).transpose(0, 1).to(dq.dtype)
        for target, gradient in ((dk, ds.transpose(1, 2) @ q_), (dv, p.transpose(1, 2) @ do)):
            summed = gradient.unflatten(0, (-1, repeats)).sum(1)
            target[start:end] = summed.transpose(0, 1).to(target.dtype)
    return softmax_lse.clone()


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    *_: None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert window_size is not None and window_size[1] == 0 and is_causal == (window_size[0] == -1)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = (-1, -1) if window_size[0] == -1 else window_size
    scale = scale or query.shape[-1] ** -0.5
    bounds, longest = (cu_seq_q, cu_seq_k), (max_q, max_k)
    out, logsumexp, *_rest = _forward(query, key, value, *bounds, *longest, 0.0, scale, True, left, right)
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None,
    window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    scale = scale or query.shape[-1] ** -0.5
    inputs, bounds = (grad_out, query, key, value, out, lse), (cu_seq_q, cu_seq_k, max_q, max_k)
    _backward(*inputs, *gradients, *bounds, 0.0, scale, True, *window_size, 0.0, None, False)
    dq, dk, dv = gradients
    return dq, dk, dv


def _compare(kv_heads: int, ends: tuple[int, ...], scores: Scores, attention: Attention = flash_2) -> None:
    documents = Documents.from_ends(np.array(ends, dtype=np.int32))
    generator = torch.Generator().manual_seed(2)
    shapes = [(24, 4, 16), (24, kv_heads, 16), (24, kv_heads, 16)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for attend in (attention, reference):
        qkv = [x.clone().requires_grad_() for x in inputs]
        out = attend(*qkv, documents, scores)
        (out.float() ** 2).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, rtol=2e-2, atol=2e-2)


ENDS = [(24,), (12, 24), (1, 5, 18, 24)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ends", ENDS)
def test_flash_2_equals_the_formula_forward_and_backward(kv_heads: int, ends: tuple[int, ...]) -> None:
    _compare(kv_heads, ends, Scores())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("scores", [Scores(window=1), Scores(window=5), Scores(softcap=1.0), Scores(7, 0.8)])
def test_flash_2_supports_windows_and_soft_caps(kv_heads: int, ends: tuple[int, ...], scores: Scores) -> None:
    _compare(kv_heads, ends, scores)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scores", [Scores(), Scores(window=1), Scores(window=5), Scores(scale=0.1)])
def test_torchs_varlen_equals_the_formula_forward_and_backward(kv_heads: int, scores: Scores) -> None:
    _compare(kv_heads, (1, 5, 18, 24), scores, varlen)
    assert is_installed("torch.nn.attention.varlen")


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_flash_2_follows_torchs_deterministic_setting(is_deterministic: bool) -> None:
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        _compare(4, (24,), Scores())
    finally:
        torch.use_deterministic_algorithms(False)
    assert CALLS["deterministic"] is is_deterministic


def test_flash_2_gets_the_dropout_probability() -> None:
    q = torch.randn(4, 2, 8).bfloat16()
    flash_2(q, q, q, Documents.from_ends(np.array([4], dtype=np.int32)), Scores(dropout=0.25))
    assert CALLS["dropout_p"] == 0.25


@pytest.mark.parametrize("fields", [{}, {"window": 6, "n_kv_heads": 2}, {"attention_softcap": 2.0}])
def test_documents_do_not_attend_to_each_other_in_flash_2(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "reference", flash_2)  # flash-2 itself is refused on a CPU
    gpt = build("reference", **fields).place(CPU, torch.bfloat16)
    ends = (3, 5, 24, 25, 48)
    documents = Documents.from_ends(np.array(ends, dtype=np.int32))
    tokens = random_tokens(2, 24)
    base = gpt.logits(tokens, documents).flatten(0, 1)
    for start, end in pairwise((0, *ends)):
        changed = tokens.flatten().clone()
        changed[start:end] = (changed[start:end] + 7) % 101
        other = gpt.logits(changed.view_as(tokens), documents).flatten(0, 1)
        same = (base == other).all(-1)
        assert same[:start].all() and same[end:].all() and not same[start:end].any()


def test_auto_is_sdpa_on_a_cpu_and_flash_kernels_are_refused_with_the_reason() -> None:
    assert choose(ModelConfig(), torch.device("cpu"), torch.bfloat16)[0] == "sdpa"
    for name in ("flash-2", "flash-3", "flash-4", "varlen"):
        model = ModelConfig.model_validate({"attention": name})
        with pytest.raises(
            ConfigError, match=rf"'{name}' cannot run here: it needs a CUDA device, this is cpu"
        ):
            choose(model, torch.device("cpu"), torch.bfloat16)


# The signatures of the real functions, so that a wrong keyword is a TypeError: hopper/flash_attn_interface.py
# of flash-attention's repository, and flash_attn/cute/interface.py of flash-attn-4 4.0.0b36.
def _flash_3_function(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    assert causal and softmax_scale is None and max_seqlen_q == max_seqlen_k
    window = None if window_size == (-1, -1) else window_size[0] + 1
    assert window is None or window_size[1] == 0
    ends = cu_seqlens_q[1:].numpy()
    return reference(q, k, v, Documents.from_ends(ends), Scores(window, softcap or None))


def _flash_4_function(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    return_lse=False,
):
    window = (-1, -1) if window_size == (None, None) else window_size
    out = _flash_3_function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, softmax_scale, causal,
        window_size=window, softcap=softcap,
    )  # fmt: skip
    return out, None


@pytest.mark.parametrize("scores", [Scores(), Scores(window=5), Scores(softcap=1.0)])
def test_flash_3_and_4_are_called_with_their_signatures(
    scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: types.ModuleType(name) for name in ("flash_attn_3", "flash_attn_3.flash_attn_interface")}
    modules["flash_attn_3.flash_attn_interface"].flash_attn_varlen_func = _flash_3_function
    modules["flash_attn.cute"] = types.ModuleType("flash_attn.cute")
    modules["flash_attn.cute"].flash_attn_varlen_func = _flash_4_function
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    documents = Documents.from_ends(np.array([1, 5, 18, 24], dtype=np.int32))
    q, k, v = (torch.randn(24, heads, 16).bfloat16() for heads in (4, 2, 2))
    for attend in (flash_3, flash_4):
        assert torch.equal(attend(q, k, v, documents, scores), reference(q, k, v, documents, scores))


def _parameters_in_source(distribution: str, path: str) -> set[str]:
    """Parameters of flash_attn_varlen_func in an installed package, which needs CUDA to be imported."""
    source = Path(str(importlib.metadata.distribution(distribution).locate_file(path))).read_text()
    [function] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    ]
    return {argument.arg for argument in function.args.args}


@pytest.mark.parametrize(
    ("attend", "module", "distribution", "path"),
    [
        (flash_3, "flash_attn_3.flash_attn_interface", "flash-attn", "hopper/flash_attn_interface.py"),
        (flash_4, "flash_attn.cute", "flash-attn-4", "flash_attn/cute/interface.py"),
    ],
)
def test_flash_3_and_4_accept_every_argument_that_they_are_called_with(
    attend: Any, module: str, distribution: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def function(**arguments: Any) -> Any:
        given.update(arguments)
        return arguments["q"] if attend is flash_3 else (arguments["q"], None)

    stand_in = types.ModuleType(module)
    stand_in.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, module.partition(".")[0], types.ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    q = torch.randn(4, 2, 8)
    attend(q, q, q, Documents.from_ends(np.array([4], dtype=np.int32)), Scores(window=2, scale=0.1))
    assert given.keys() <= _parameters_in_source(distribution, path)


def test_the_early_flash_4_inside_flash_2_does_not_count_as_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("flash_attn.cute")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    module.flash_attn_varlen_func = _flash_4_function
    assert is_installed("flash_attn.cute")
    # flash-attn 2.8.3.post2, flash_attn/cute/interface.py
    module.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False: None
    assert not is_installed("flash_attn.cute")
    assert not is_installed("flash_attn_3.flash_attn_interface")


@pytest.mark.parametrize(
    ("capability", "installed", "fields", "chosen"),
    [
        ((8, 0), {"flash_attn"}, {}, "flash-2"),
        ((8, 0), {"flash_attn", "flash_attn_3.flash_attn_interface", "flash_attn.cute"}, {}, "flash-2"),
        ((9, 0), {"flash_attn", "flash_attn_3.flash_attn_interface"}, {}, "flash-3"),
        ((9, 0), {"flash_attn", "flash_attn_3.flash_attn_interface"}, {"dropout": 0.1}, "flash-2"),
        ((10, 0), {"flash_attn", "flash_attn_3.flash_attn_interface", "flash_attn.cute"}, {}, "flash-4"),
        ((10, 0), {"flash_attn", "flash_attn.cute"}, {"d_head": 192}, "flash-2"),
        ((10, 0), set(), {}, "sdpa"),
        ((9, 0), {"torch.nn.attention.varlen"}, {}, "varlen"),
        ((9, 0), {"torch.nn.attention.varlen", "flash_attn"}, {}, "flash-2"),
        ((9, 0), {"torch.nn.attention.varlen"}, {"dropout": 0.1}, "sdpa"),
        ((7, 0), {"flash_attn"}, {}, "sdpa"),
        ((9, 0), {"flash_attn"}, {"d_head": 20}, "sdpa"),
        ((9, 0), {"flash_attn"}, {"d_head": 20, "attention_softcap": 9.0}, "reference"),
    ],
)
def test_auto_chooses_by_hardware_package_and_shape(
    capability: tuple[int, int],
    installed: set[str],
    fields: dict[str, object],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt.model.hardware.compute_capability", lambda _: capability)
    monkeypatch.setattr("gpt.model.attention.is_installed", lambda module: module in installed)
    model = ModelConfig.model_validate(fields)
    assert choose(model, torch.device("cuda"), torch.bfloat16)[0] == chosen


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "reason"),
    [
        (
            "flash-2",
            (7, 5),
            torch.bfloat16,
            "it needs Ampere (A100) or newer, this GPU has compute capability 7.5",
        ),
        (
            "flash-3",
            (8, 0),
            torch.bfloat16,
            "it needs Hopper (H100, H200), this GPU has compute capability 8.0",
        ),
        (
            "flash-4",
            (8, 9),
            torch.bfloat16,
            "it needs Hopper or Blackwell, this GPU has compute capability 8.9",
        ),
        ("flash-2", (9, 0), torch.float32, "it computes in bf16 or fp16, not fp32"),
        ("flash-3", (9, 0), torch.bfloat16, "the package flash-attn's hopper/ is not installed"),
        ("flash-4", (9, 0), torch.bfloat16, "the package flash-attn-4 is not installed"),
    ],
)
def test_a_named_flash_kernel_that_cannot_run_is_refused_with_the_reason(
    name: str, capability: tuple[int, int], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.model.hardware.compute_capability", lambda _: capability)
    with pytest.raises(ConfigError) as error:
        choose(ModelConfig.model_validate({"attention": name}), torch.device("cuda"), dtype)
    assert str(error.value) == f"model.attention = {name!r} cannot run here: {reason}. Use 'auto'."
