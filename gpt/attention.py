"""Causal attention inside documents, by one of three kernels chosen once.

    # B batch, T tokens, H query heads, K key/value heads, E head width, N documents

All compute softmax(Q Kᵀ / √E) V (Vaswani et al. 2017, equation 1) with the causal mask, inside each
document only. `flash-2` is FlashAttention-2 (Dao 2023, arXiv:2307.08691; the tiling and the online
softmax are those of FlashAttention, Dao et al. 2022, arXiv:2205.14135) through flash-attn's varlen
kernel; `sdpa` is torch's own flash kernel; `reference` is the formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.layers import compute_dtype


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch end, in the flattened B·T tokens; every row's end is one."""

    lengths: tuple[int, ...]
    starts_by_length: dict[int, Tensor]
    cumulative_n1: Tensor
    longest: int

    @classmethod
    def from_ends(cls, ends_n: NDArray[np.int32], device: torch.device | str = "cpu") -> "Documents":
        """`ends_n`: exclusive ends, strictly increasing, the last one B·T."""
        bounds = np.concatenate(([0], ends_n)).astype(np.int32)
        lengths = np.diff(bounds)
        by_length = {
            int(length): torch.from_numpy(bounds[:-1][lengths == length].astype(np.int64)).to(device)
            for length in np.unique(lengths)
        }
        cumulative = torch.from_numpy(bounds).to(device)
        return cls(tuple(lengths.tolist()), by_length, cumulative, int(lengths.max()))


Attention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
"""(q [B·T, H, E], k [B·T, K, E], v [B·T, K, E], documents) → [B·T, H, E]"""


def choose(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> tuple[str, Attention]:
    """The kernel that `name` (or "auto") means here. Raises ConfigError when a named one cannot run."""
    obstacle = _flash_2_obstacle(device, dtype, head_width)
    if name == "auto":
        name = "sdpa" if obstacle else "flash-2"
    if name == "flash-2" and obstacle:
        raise ConfigError(f"model.attention = 'flash-2' cannot run here: {obstacle}. Use 'auto' or 'sdpa'.")
    return name, {"flash-2": flash_2, "sdpa": sdpa, "reference": reference}[name]


def flash_2(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-2, documents as variable-length sequences: O(B·T) memory, no mask."""
    from flash_attn import flash_attn_varlen_func

    bounds = documents.cumulative_n1
    out: Tensor = flash_attn_varlen_func(
        q=q_xhe,
        k=k_xke,
        v=v_xke,
        cu_seqlens_q=bounds,
        # one tensor for both breaks torch.compile(fullgraph=True)
        cu_seqlens_k=bounds.clone(),
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        causal=True,
    )
    return out


def sdpa(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents) -> Tensor:
    """torch's scaled_dot_product_attention, once for all documents of one length: no T × T mask."""
    dtype = compute_dtype(q_xhe)
    q, k, v = q_xhe.to(dtype), k_xke.to(dtype), v_xke.to(dtype)
    groups = documents.starts_by_length
    outs, places = [], []
    for length, starts_n in groups.items():
        if len(groups) == 1:  # every document has this length: plain views do
            parts = [x.view(-1, length, *x.shape[1:]) for x in (q, k, v)]
        else:
            place_nt = starts_n[:, None] + torch.arange(length, device=starts_n.device)
            places.append(place_nt.flatten())
            parts = [x[place_nt] for x in (q, k, v)]
        # [N, T, H, E] → [N, H, T, E] and back
        qn, kn, vn = (part.transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(qn, kn, vn, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    if len(groups) == 1:
        return outs[0].to(q_xhe.dtype)
    back = torch.empty_like(torch.cat(places))
    back[torch.cat(places)] = torch.arange(len(back), device=back.device)
    return torch.cat(outs)[back].to(q_xhe.dtype)


def reference(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents) -> Tensor:
    """The formula, document by document, in fp32."""
    outs = []
    repeats = q_xhe.shape[1] // k_xke.shape[1]
    split = (torch.split(x, list(documents.lengths)) for x in (q_xhe, k_xke, v_xke))
    for q, k, v in zip(*split, strict=True):
        q_het, k_het, v_het = (x.float().transpose(0, 1) for x in (q, k, v))
        k_het, v_het = k_het.repeat_interleave(repeats, 0), v_het.repeat_interleave(repeats, 0)
        scores_htt = q_het @ k_het.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores_htt.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outs.append((scores_htt.masked_fill(future, -math.inf).softmax(-1) @ v_het).transpose(0, 1))
    return torch.cat(outs).to(q_xhe.dtype)


def _flash_2_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why FlashAttention-2 cannot run, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'outlast[gpu]')"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, not {dtype}"
    if head_width > 256 or head_width % 8:
        return f"head width {head_width} is not a multiple of 8 up to 256"
    return None
