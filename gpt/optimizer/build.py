"""The optimizer of a run over its parameter groups."""

import torch
from torch import nn

from gpt.config.optimizer import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.optimizer.adamw import AdamW
from gpt.optimizer.muon import MuonAdamW
from gpt.optimizer.parameter_groups import by_group, hyperparameters


def parameter_groups(gpt: GPT, optimizer: OptimizerConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group."""
    # Stage 3 takes the shapes of its parameters away and keeps them here.
    shaped = ((name, getattr(p, "ds_shape", p.shape), p) for name, p in gpt.named_parameters())
    return by_group(shaped, gpt.model, optimizer)


def build_optimizer(gpt: GPT, optimizer: OptimizerConfig, dtype: torch.dtype) -> AdamW:
    """The optimizer over `parameter_groups`, in that order; each torch group carries its name.

    Muon works on matrices in `dtype`.
    """
    groups = [
        {"params": [p for _, p in members], "name": name, **hyperparameters(name, optimizer, gpt.model)}
        for name, members in parameter_groups(gpt, optimizer).items()
    ]
    return MuonAdamW(groups, optimizer, dtype) if optimizer.name == "muon" else AdamW(groups, optimizer)


def group_table(gpt: GPT, optimizer: OptimizerConfig) -> str:
    """Which parameters are in which group, in one line for the log."""
    parts = []
    for name, members in parameter_groups(gpt, optimizer).items():
        numel = sum(getattr(p, "ds_numel", p.numel()) for _, p in members)
        decay = hyperparameters(name, optimizer, gpt.model)["weight_decay"]
        rule = "Muon" if name == "muon" else "AdamW"
        parts.append(f"{name}: {rule}, {len(members)} tensors, {numel:,} elements, weight decay {decay:g}")
    return "; ".join(parts)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate where the schedule says `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
