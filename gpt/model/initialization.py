"""Initial weights as in GPT-2, Llama or muP.

    # L blocks, D model width, m = D over the width at which the learning rate was tuned

Every scheme is a pure function of (config, seed): one generator on the CPU draws the parameters in the order
in which the network registers them. Biases start at 0, norms at 1.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from gpt.config.model import ModelConfig

_STD = 0.02
_RESIDUAL = ("attention.output.weight", "ffn.down.weight")  # what writes to the residual stream


@torch.no_grad()
def initialize(parameters: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, seed: int) -> None:
    """Fill the network's named `parameters` in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif model.initialization == "llama":
            _draw_llama(name, parameter, model, generator)
        else:
            parameter.normal_(0.0, _std(name, model), generator=generator)


def _std(name: str, model: ModelConfig) -> float:
    """The standard deviation of GPT-2's weights, or of muP's, which equals GPT-2's at m = 1.

    GPT-2 (Radford et al. 2019, section 2.3, and its published code) draws from N(0, 0.02²) and scales what
    writes to the residual stream by 1/√(2L). In muP (Yang et al. 2022, arXiv:2203.03466, table 8) the
    variance of matrices inside the blocks falls as 1/m, that of embeddings and head stays, and the head
    divides its output by m (gpt.model.gpt.Head).
    """
    std = _STD / math.sqrt(2 * model.n_layers) if name.endswith(_RESIDUAL) else _STD
    return std / math.sqrt(model.width_ratio) if name.startswith("blocks.") else std


def _draw_llama(name: str, parameter: nn.Parameter, model: ModelConfig, generator: torch.Generator) -> None:
    """Draw as torchtitan (Liang et al. 2024, arXiv:2410.06511) does for Llama 3; Meta's code is not public.

    Blocks: N(0, 0.02²); in block l = 0, 1, … what writes to the residual stream and the value half of a gate
    are scaled by 1/√(2(l + 1)). Embeddings: N(0, 1). Head, tied or not: N(0, 1/D), truncated at three
    standard deviations.
    """
    if name == "head.weight" or (name == "embedding.weight" and model.tie_embeddings):
        std = model.d_model**-0.5
        nn.init.trunc_normal_(parameter, 0.0, std, -3 * std, 3 * std, generator)
        return
    if not name.startswith("blocks."):
        parameter.normal_(generator=generator)
        return
    parameter.normal_(0.0, _STD, generator=generator)
    depth_scale = 1 / math.sqrt(2 * (int(name.split(".")[1]) + 1))
    if name.endswith(_RESIDUAL):
        parameter.mul_(depth_scale)
    elif name.endswith("ffn.up.weight") and model.is_gated:
        parameter[model.ffn_width :].mul_(depth_scale)
