"""Causal attention inside documents, by one of several kernels.

    # B batch, T tokens, H query heads, K key/value heads, E head width, N documents

All compute softmax(Q Kᵀ / √E) V (Vaswani et al. 2017, equation 1; muP replaces 1/√E) with the causal mask,
inside each document only. With a window (Longformer, arXiv:2004.05150; Mistral 7B, arXiv:2310.06825) a token
attends to the last W tokens, itself included. With a soft-cap (Gemma 2, arXiv:2408.00118, section 2) the
scores are c · tanh(x / c).

`flash-2` is FlashAttention-2 (Dao 2023, arXiv:2307.08691), with the tiling and the online softmax of
FlashAttention (Dao et al. 2022, arXiv:2205.14135), through flash-attn's kernel for sequences of variable
length. `flash-3` (Shah et al. 2024, arXiv:2407.08608) and `flash-4` are its successors for Hopper and
Blackwell. `varlen` is the copy of FlashAttention-2 in torch, `sdpa` torch's kernels for one length at a time.
`reference` is the formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.config.attention_kernels import ATTENTION_KERNELS, KernelSpec, kernel_spec
from gpt.config.model import ModelConfig
from gpt.model import hardware


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch end in the flattened B·T tokens. One ends at the end of every row."""

    lengths: tuple[int, ...]
    cumulative_n1: Tensor
    longest: int

    @classmethod
    def from_ends(cls, ends_n: NDArray[np.int32], device: torch.device | str = "cpu") -> "Documents":
        """`ends_n` are exclusive ends, strictly increasing, the last one B·T."""
        bounds = np.concatenate(([0], ends_n)).astype(np.int32)
        lengths = np.diff(bounds)
        cumulative = torch.from_numpy(bounds).to(device)
        return cls(tuple(lengths.tolist()), cumulative, int(lengths.max()))


@dataclass(frozen=True)
class Scores:
    """What changes the attention scores, in addition to the causal mask."""

    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    scale: float | None = None  # replaces 1/√E

    @classmethod
    def of(cls, model: ModelConfig, *, is_training: bool) -> "Scores":
        """The scores of the config, with dropout in training only."""
        dropout = model.dropout if is_training else 0.0
        return cls(model.window, model.attention_softcap, dropout, model.attention_scale)


Attention = Callable[[Tensor, Tensor, Tensor, Documents, Scores], Tensor]
"""(q [B·T, H, E], k [B·T, K, E], v [B·T, K, E], documents, scores) → [B·T, H, E]"""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def flash_2(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """FlashAttention-2 over documents as sequences of variable length: O(B·T) memory, no mask.

    Its backward pass sums dQ with atomics, so in any order, unless torch.use_deterministic_algorithms is on.
    """
    from flash_attn import flash_attn_varlen_func

    arguments = _flash_arguments(documents, scores, open_end=-1)
    out: Tensor = flash_attn_varlen_func(q=q_xhe, k=k_xke, v=v_xke, dropout_p=scores.dropout, **arguments)
    return out


def flash_3(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """FlashAttention-3, called like flash_2, without dropout."""
    from flash_attn_3.flash_attn_interface import flash_attn_varlen_func

    assert scores.dropout == 0.0
    arguments = _flash_arguments(documents, scores, open_end=-1)
    out: Tensor = flash_attn_varlen_func(q=q_xhe, k=k_xke, v=v_xke, **arguments)
    return out


def flash_4(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """FlashAttention-4, called like flash_3; an open window is None, and it also returns the log-sum-exp."""
    from flash_attn.cute import flash_attn_varlen_func

    assert scores.dropout == 0.0
    out: Tensor
    arguments = _flash_arguments(documents, scores, open_end=None)
    out, _ = flash_attn_varlen_func(q=q_xhe, k=k_xke, v=v_xke, **arguments)
    return out


def _flash_arguments(documents: Documents, scores: Scores, *, open_end: int | None) -> dict[str, Any]:
    """The arguments that all three FlashAttention functions take."""
    bounds = documents.cumulative_n1
    return {
        "cu_seqlens_q": bounds,
        # The same tensor twice breaks torch.compile(fullgraph=True).
        "cu_seqlens_k": bounds.clone(),
        "max_seqlen_q": documents.longest,
        "max_seqlen_k": documents.longest,
        "softmax_scale": scores.scale,
        "causal": True,
        # They count the tokens before the query; `window` includes the query.
        "window_size": (open_end, open_end) if scores.window is None else (scores.window - 1, 0),
        "softcap": scores.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def varlen(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """torch's own FlashAttention-2 over sequences of variable length, without soft-cap and dropout.

    Its backward pass follows torch.use_deterministic_algorithms, as that of flash_2.
    """
    from torch.nn.attention.varlen import varlen_attn

    assert scores.softcap is None and scores.dropout == 0.0
    bounds = documents.cumulative_n1
    out = varlen_attn(
        q_xhe,
        k_xke,
        v_xke,
        cu_seq_q=bounds,
        cu_seq_k=bounds.clone(),
        max_q=documents.longest,
        max_k=documents.longest,
        scale=scores.scale,
        window_size=(-1 if scores.window is None else scores.window - 1, 0),  # 0 after the query: causal
        enable_gqa=q_xhe.shape[1] != k_xke.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def sdpa(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """torch's scaled_dot_product_attention, called once per document, or once if all are equally long.

    It builds no T × T mask. Documents are views of the flattened tokens. Gathering documents of one length
    into a batch costs more, because the backward pass of a gather adds row by row.
    """
    assert scores.softcap is None
    dtype, lengths = hardware.compute_dtype(q_xhe), documents.lengths
    q, k, v = q_xhe.to(dtype), k_xke.to(dtype), v_xke.to(dtype)
    if len(set(lengths)) == 1:
        parts = [tuple(x.view(-1, lengths[0], *x.shape[1:]) for x in (q, k, v))]
    else:
        split = (torch.split(x[None], list(lengths), dim=1) for x in (q, k, v))
        parts = list(zip(*split, strict=True))
    outs = []
    for part in parts:
        # [N, T, H, E] → [N, H, T, E] and back
        qn, kn, vn = (x.transpose(1, 2) for x in part)
        outs.append(_sdpa_of_one_length(qn, kn, vn, scores).transpose(1, 2).flatten(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(q_xhe.dtype)


def _sdpa_of_one_length(q_nhte: Tensor, k_nkte: Tensor, v_nkte: Tensor, scores: Scores) -> Tensor:
    length, window = q_nhte.shape[2], scores.window
    is_grouped = q_nhte.shape[1] != k_nkte.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(
            q_nhte,
            k_nkte,
            v_nkte,
            is_causal=True,
            dropout_p=scores.dropout,
            scale=scores.scale,
            enable_gqa=is_grouped,
        )
    outs = []
    for start in range(0, length, window):  # W queries attend to fewer than 2W keys: O(T·W)
        end, first = min(start + window, length), max(0, start - window + 1)
        out = F.scaled_dot_product_attention(
            q_nhte[:, :, start:end],
            k_nkte[:, :, first:end],
            v_nkte[:, :, first:end],
            attn_mask=_is_seen(start, end, first, window, q_nhte.device),
            dropout_p=scores.dropout,
            scale=scores.scale,
            enable_gqa=is_grouped,
        )
        outs.append(out)
    return torch.cat(outs, dim=2)


def reference(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """The formula, document by document, in fp32."""
    outs = []
    split = (torch.split(x, list(documents.lengths)) for x in (q_xhe, k_xke, v_xke))
    for q, k, v in zip(*split, strict=True):
        outs.append(formula(q, k, v, scores))
    return torch.cat(outs).to(q_xhe.dtype)


def formula(q_the: Tensor, k_ske: Tensor, v_ske: Tensor, scores: Scores) -> Tensor:
    """Attention of the last T of a document's S positions to all S, fp32 [T, H, E]."""
    t, s, repeats = len(q_the), len(k_ske), q_the.shape[1] // k_ske.shape[1]
    q_hte, k_hse, v_hse = (x.float().transpose(0, 1) for x in (q_the, k_ske, v_ske))
    k_hse, v_hse = k_hse.repeat_interleave(repeats, 0), v_hse.repeat_interleave(repeats, 0)
    x_hts = q_hte @ k_hse.transpose(1, 2) * (scores.scale or 1 / math.sqrt(q_the.shape[-1]))
    if scores.softcap is not None:
        x_hts = scores.softcap * torch.tanh(x_hts / scores.softcap)
    x_hts = x_hts.masked_fill(~_is_seen(s - t, s, 0, scores.window, q_the.device), -math.inf)
    weights_hts = F.dropout(x_hts.softmax(-1), scores.dropout)
    return (weights_hts @ v_hse).transpose(0, 1)


def _is_seen(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Whether queries `start` to `end` attend to keys `first` to `end`: the causal band, bool [T, S]."""
    distance = (
        torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)[None, :]
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


# The function of each row of gpt.config.attention_kernels.ATTENTION_KERNELS
KERNELS: dict[str, Attention] = {
    "flash-4": flash_4,
    "flash-3": flash_3,
    "flash-2": flash_2,
    "varlen": varlen,
    "sdpa": sdpa,
    "reference": reference,
}


def choose(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """The kernel that `model.attention` names, or for auto the first one that can run here.

    Raises ConfigError when a named kernel cannot run.
    """
    if model.attention == "auto":
        name = next(
            kernel.name for kernel in ATTENTION_KERNELS if obstacle(kernel, model, device, dtype) is None
        )
        return name, KERNELS[name]
    spec = kernel_spec(model.attention)
    assert spec is not None, "the config knows its kernels"
    if (problem := obstacle(spec, model, device, dtype)) is not None:
        raise ConfigError(f"model.attention = {spec.name!r} cannot run here: {problem}. Use 'auto'.")
    return spec.name, KERNELS[spec.name]


def obstacle(kernel: KernelSpec, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `kernel` cannot compute this attention on `device`, or None."""
    if kernel.gpu is not None:
        capability = hardware.compute_capability(device)
        if capability is None:
            return f"it needs a CUDA device, this is {device.type}"
        major, minor = capability
        if major not in kernel.gpu.capabilities:
            return f"it needs {kernel.gpu.hardware}, this GPU has compute capability {major}.{minor}"
        if model.head_width in kernel.gpu.missing_head_widths.get(major, ()):
            return f"on compute capability {major}.{minor} it has no head width of {model.head_width}"
        varying = kernel.gpu.nondeterministic_head_widths.get(major, ())
        if model.head_width in varying and torch.are_deterministic_algorithms_enabled():
            return (
                f"deterministic = true, and on compute capability {major}.{minor} its gradients for a head "
                f"width of {model.head_width} differ from one time to the next"
            )
    dtype_name = _DTYPE_NAMES.get(dtype, str(dtype))
    if kernel.dtypes is not None and dtype_name not in kernel.dtypes:
        return f"it computes in {' or '.join(kernel.dtypes)}, not {dtype_name}"
    if (problem := model.unsupported_by(kernel)) is not None:
        return problem
    if kernel.gpu is not None and not is_installed(kernel.gpu.module):
        return f"the package {kernel.gpu.package} is not installed"
    return None


def is_installed(module: str) -> bool:
    """Whether `module` has a kernel that takes the arguments with which it is called here.

    flash-attn 2 contains a flash_attn.cute too, an early flash-attn-4 that takes other arguments. Before 2.13
    torch's kernel had fewer.
    """
    name, arguments = "flash_attn_varlen_func", {"max_seqlen_q", "deterministic"}
    if module.startswith("torch."):
        name, arguments = "varlen_attn", {"window_size", "scale", "enable_gqa"}
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return arguments <= signature(function).parameters.keys()
