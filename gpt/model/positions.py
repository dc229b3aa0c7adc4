"""Position encodings (rotary, scaled rotary, sinusoidal) and the positions of tokens in their documents.

# B batch, T tokens, D model width, H heads, E head width
"""

import math
from typing import Any

import torch
from torch import Tensor

from gpt.config.model import ModelConfig, RopeScaling
from gpt.model.attention import Documents


def rope_table(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [context, E]: RoFormer (Su et al. 2021, arXiv:2104.09864), equation 15.

    The pairs are (i, i + E/2) as in Llama's published weights, not (2i, 2i + 1) as in the paper: the two are
    the same map up to a fixed permutation of the head's dimensions.
    """
    e, theta = model.head_width, model.rope_theta
    frequency = theta ** (-torch.arange(0, e, 2, dtype=torch.float32) / e)
    magnitude = 1.0
    if model.rope_scaling is not None:
        frequency, magnitude = _scaled(frequency, model, model.rope_scaling)
    angle = torch.outer(torch.arange(model.context, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * magnitude, angle.sin() * magnitude


def _scaled(frequency: Tensor, model: ModelConfig, scaling: RopeScaling) -> tuple[Tensor, float]:
    """The frequencies for the longer context, and the factor of both queries and keys."""
    original = scaling.context_before(model.context)
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":  # Chen et al. 2023, arXiv:2306.15595, equation 4
        return stretched, 1.0
    if scaling.kind == "llama3":
        # The turns in the original context decide how much of a frequency stays (Llama 3.1's published code).
        turns = original * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return stretched * (1 - kept) + frequency * kept, 1.0
    # YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2. The ramp runs over the index of the dimension as
    # in the published code, not over the turns as in the paper.
    half = len(frequency)

    def dimension_with(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(model.rope_theta)

    first = max(math.floor(dimension_with(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension_with(scaling.beta_slow)), 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - first) / ((last - first) or 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    # equation 22: a temperature of the scores, applied to q and k
    return stretched * (1 - kept) + frequency * kept, 0.1 * math.log(scaling.factor) + 1.0


class _Rotation(torch.autograd.Function):
    """The rotation, with its gradient by formula: the rotation back, in half the passes of autograd's."""

    @staticmethod
    def forward(ctx: Any, x_bthe: Tensor, cos_te: Tensor, sin_te: Tensor) -> Tensor:
        ctx.save_for_backward(cos_te, sin_te)
        return _turned(x_bthe, cos_te, sin_te, 1)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor, None, None]:
        (d_out_bthe,) = d_outs
        cos_te, sin_te = ctx.saved_tensors
        return _turned(d_out_bthe, cos_te, sin_te, -1), None, None


def _turned(x_bthe: Tensor, cos_te: Tensor, sin_te: Tensor, sign: int) -> Tensor:
    half = x_bthe.shape[-1] // 2
    sin = sin_te[:, None, :half]
    out = x_bthe * cos_te[:, None, :]  # fp32, as the angles are
    out[..., :half].addcmul_(x_bthe[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x_bthe[..., :half], sin, value=sign)
    return out.to(x_bthe.dtype)


def rotate(x_bthe: Tensor, cos_te: Tensor, sin_te: Tensor) -> Tensor:
    """Queries or keys [B, T, H, E] rotated by their positions; computed in fp32."""
    turned: Tensor = _Rotation.apply(x_bthe, cos_te, sin_te)  # type: ignore[no-untyped-call]
    return turned


def sinusoid_table(context: int, d_model: int) -> Tensor:
    """Fixed positions, fp32 [context, D]: sin in even columns, cos in odd (Vaswani et al. 2017, 3.5)."""
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def positions(documents: Documents, tokens_bt: Tensor) -> Tensor:
    """The position of each token in its document, from 0, int64 [B, T]."""
    starts = documents.cumulative_n1[:-1].long()
    lengths = documents.cumulative_n1.diff().long()
    index = torch.arange(tokens_bt.numel(), device=tokens_bt.device)
    # Without output_size the host would wait for the GPU to know it.
    starts_of_tokens = starts.repeat_interleave(lengths, output_size=tokens_bt.numel())
    return (index - starts_of_tokens).view_as(tokens_bt)
