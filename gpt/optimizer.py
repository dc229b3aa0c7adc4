"""AdamW and its parameter groups.

Adam (Kingma & Ba 2014, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov & Hutter
2019, arXiv:1711.05101, algorithm 2): torch's implementation, which ZeRO runs on each rank's flat part.
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from gpt.config import OptimizerConfig
from gpt.model import GPT
from gpt.model_config import ModelConfig

T = TypeVar("T")


def by_group(
    parameters: Iterable[tuple[str, tuple[int, ...], T]], model: ModelConfig
) -> dict[str, list[tuple[str, T]]]:
    """(name, shape, anything) by group, in the groups' order; empty groups are left out.

    decay: matrices and embeddings. hidden: with muP the matrices inside the blocks, whose rate is another.
    no_decay: norms and biases.
    """
    groups: dict[str, list[tuple[str, T]]] = {"decay": [], "hidden": [], "no_decay": []}
    for name, shape, value in parameters:
        is_hidden = model.initialization == "mup" and name.startswith("blocks.")
        group = "no_decay" if len(shape) < 2 else "hidden" if is_hidden else "decay"
        groups[group].append((name, value))
    return {group: members for group, members in groups.items() if members}


def parameter_groups(gpt: GPT) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group."""
    # Stage 3 takes the shapes of its parameters away and keeps them here.
    shaped = ((name, getattr(p, "ds_shape", p.shape), p) for name, p in gpt.named_parameters())
    return by_group(shaped, gpt.model)


def hyperparameters(group: str, optimizer: OptimizerConfig, model: ModelConfig) -> dict[str, float]:
    """Weight decay of a group, and the factor of its learning rate.

    muP (Yang et al. 2022, arXiv:2203.03466, table 8, Adam): the rate of hidden matrices falls with the
    width. Their decay, which torch multiplies by the rate, rises by as much, so that weights shrink at one
    pace whatever the width, without which rates do not carry over (Kosson et al. 2025, arXiv:2510.19093).
    """
    decay = 0.0 if group == "no_decay" else optimizer.weight_decay
    ratio = model.width_ratio if group == "hidden" else 1.0
    return {"weight_decay": decay * ratio, "lr_multiplier": 1 / ratio}


def build_optimizer(gpt: GPT, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(gpt)`, in that order; each torch group carries its name."""
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "name": name,
            **hyperparameters(name, optimizer, gpt.model),
        }
        for name, members in parameter_groups(gpt).items()
    ]
    implementations = {"adamw": torch.optim.AdamW}
    return implementations[optimizer.name](
        groups, lr=optimizer.peak_lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate where the schedule says `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
