"""The optimizer of a run over its parameter groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpt.config.optimizer import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.optimizer.adamw import AdamW
from gpt.optimizer.base import RunOptimizer
from gpt.optimizer.muon import MuonAdamW
from gpt.optimizer.parameter_groups import by_group, hyperparameters

OptimizerClass = Callable[[list[dict[str, Any]], OptimizerConfig, torch.dtype], RunOptimizer]

# The class of each row of gpt.config.optimizer_spec.OPTIMIZERS
OPTIMIZER_CLASSES: dict[str, OptimizerClass] = {"adamw": AdamW, "muon": MuonAdamW}


def parameter_groups(gpt: GPT, optimizer: OptimizerConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group."""
    # Stage 3 empties its parameters and keeps their shapes here.
    shaped = ((name, getattr(p, "ds_shape", p.shape), p) for name, p in gpt.named_parameters())
    return by_group(shaped, gpt.model, optimizer)


def build_optimizer(gpt: GPT, optimizer: OptimizerConfig, dtype: torch.dtype) -> RunOptimizer:
    """The optimizer over `parameter_groups`, in that order; each torch group carries its name.

    `dtype` is that of the network.
    """
    groups = [
        {"params": [p for _, p in members], "name": name, **hyperparameters(name, optimizer, gpt.model)}
        for name, members in parameter_groups(gpt, optimizer).items()
    ]
    return OPTIMIZER_CLASSES[optimizer.name](groups, optimizer, dtype)


def group_table(gpt: GPT, optimizer: OptimizerConfig) -> str:
    """One line for the log: the update rule, the size and the weight decay of each group."""
    parts = []
    for name, members in parameter_groups(gpt, optimizer).items():
        numel = sum(getattr(p, "ds_numel", p.numel()) for _, p in members)
        decay = hyperparameters(name, optimizer, gpt.model)["weight_decay"]
        rule = optimizer.spec.group(name).rule
        parts.append(f"{name}: {rule}, {len(members)} tensors, {numel:,} elements, weight decay {decay:g}")
    return "; ".join(parts)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to `lr` times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
