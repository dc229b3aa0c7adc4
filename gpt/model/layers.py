"""Linear layers, norms and feed-forward variants.

# B batch, T tokens, D model width, F feed-forward width, H heads, E head width
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config.model import ModelConfig
from gpt.model.hardware import compute_dtype, is_cpu


class Embedding(nn.Embedding):
    """A row per id. Like Linear, it has no values until the network is initialised or loaded."""

    def reset_parameters(self) -> None:
        """Skip torch's own draw, which would be overwritten and takes as long as the initial weights."""


class Linear(nn.Linear):
    """x W^T + b."""

    def reset_parameters(self) -> None:
        """Skip torch's own draw, as Embedding does."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of `input`."""
        dtype = compute_dtype(input)
        if dtype == input.dtype:
            return F.linear(input, self.weight, self.bias)
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias).to(input.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · g (Zhang & Sennrich 2019, arXiv:1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_btd: Tensor) -> Tensor:
        """[..., D] → [..., D], in the dtype of `x_btd`."""
        if not is_cpu(x_btd.device):  # one kernel instead of seven; on CPUs torch's function is slower
            return F.rms_norm(x_btd, self.weight.shape, self.weight, self.eps)
        x32 = x_btd.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x_btd.dtype) * self.weight


def build_norm(model: ModelConfig) -> nn.Module:
    """The norm over the model width that the config names."""
    if model.norm == "rmsnorm":
        return RMSNorm(model.d_model, model.norm_eps)
    return nn.LayerNorm(model.d_model, eps=model.norm_eps, bias=model.bias)


# GLU Variants Improve Transformer (Shazeer 2020, arXiv:2002.05202), equations 5 and 6:
#   FFN_f(x) = f(x W) W2        gated: FFN_f(x) = (f(x W) ⊗ x V) W2
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "glu": torch.sigmoid,
    "bilinear": lambda x: x,
    "reglu": F.relu,
    "geglu": F.gelu,
    "swiglu": F.silu,
    "relu2": lambda x: F.relu(x).square(),  # Primer (So et al. 2021, arXiv:2109.08668, section 3)
}


class FeedForward(nn.Module):
    """The position-wise network of a block (Vaswani et al. 2017, section 3.3), plain or gated.

    In a gated variant `up` stacks W on V, so one multiplication computes both.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[model.ffn]
        # GPT-2's GELU is the tanh approximation (Radford et al. 2019, published code).
        if model.ffn == "gelu":
            self.activation = lambda x: F.gelu(x, approximate="tanh")
        self.is_gated = model.is_gated
        width = model.ffn_width
        self.up = Linear(model.d_model, 2 * width if self.is_gated else width, bias=model.bias)
        self.down = Linear(width, model.d_model, bias=model.bias)

    def forward(self, x_btd: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        hidden = self.up(x_btd)
        if self.is_gated:
            gate_btf, value_btf = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate_btf) * value_btf
        else:
            hidden = self.activation(hidden)
        out: Tensor = self.down(hidden)
        return out
