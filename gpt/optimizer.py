"""AdamW and its parameter groups.

Adam (Kingma & Ba 2014, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov & Hutter
2019, arXiv:1711.05101, algorithm 2): torch's implementation, which ZeRO runs on each rank's flat part.
"""

import torch
from torch import nn

from gpt.config import OptimizerConfig


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group: matrices and embeddings decay, norms and biases do not."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        # Stage 3 takes the shapes of its parameters away and keeps them here.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups["decay" if len(shape) >= 2 else "no_decay"].append((name, parameter))
    return {name: members for name, members in groups.items() if members}


def build_optimizer(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups(model)`, in that order; each torch group carries its name."""
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "name": name,
            "weight_decay": optimizer.weight_decay if name == "decay" else 0.0,
        }
        for name, members in parameter_groups(model).items()
    ]
    implementations = {"adamw": torch.optim.AdamW}
    return implementations[optimizer.name](
        groups, lr=optimizer.peak_lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
    )
