"""AdamW and its parameter groups.

Adam (Kingma & Ba 2014, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov & Hutter
2019, arXiv:1711.05101, algorithm 2): torch's implementation, which ZeRO runs on each rank's flat part.
"""

import torch
from torch import nn

from gpt.config import OptimizerConfig

GROUP_NAMES = ("decay", "no_decay")


def group_of(name: str, parameter: nn.Parameter) -> str:
    """Matrices and embeddings decay; norms and biases do not."""
    del name
    return "decay" if parameter.ndim >= 2 else "no_decay"


def build_optimizer(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with one group for each of GROUP_NAMES that has parameters, in that order."""
    groups = []
    for group_name in GROUP_NAMES:
        members = [p for name, p in model.named_parameters() if group_of(name, p) == group_name]
        decay = optimizer.weight_decay if group_name == "decay" else 0.0
        if members:
            groups.append({"params": members, "weight_decay": decay, "name": group_name})
    return torch.optim.AdamW(
        groups, lr=optimizer.peak_lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
    )
