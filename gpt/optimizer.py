"""The optimizer of a run, and its parameter groups by rule."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from gpt.adamw import AdamW
from gpt.model import GPT
from gpt.model_config import ModelConfig
from gpt.muon import MuonAdamW
from gpt.optimizer_config import OptimizerConfig

T = TypeVar("T")


def by_group(
    parameters: Iterable[tuple[str, tuple[int, ...], T]], model: ModelConfig, optimizer: OptimizerConfig
) -> dict[str, list[tuple[str, T]]]:
    """(name, shape, anything) by group, in the groups' order; empty groups are left out.

    decay: matrices and embeddings. hidden: with muP the matrices inside the blocks, whose rate is another;
    muon: those same ones where Muon updates them. no_decay: norms and biases.
    """
    groups: dict[str, list[tuple[str, T]]] = {"decay": [], "hidden": [], "muon": [], "no_decay": []}
    of_blocks = "muon" if optimizer.name == "muon" else "hidden" if model.initialization == "mup" else "decay"
    for name, shape, value in parameters:
        group = "no_decay" if len(shape) < 2 else of_blocks if name.startswith("blocks.") else "decay"
        groups[group].append((name, value))
    return {group: members for group, members in groups.items() if members}


def states(group: str) -> tuple[str, ...]:
    """What is kept of the parameters of a group, in the order of a checkpoint."""
    return ("master", "momentum_buffer") if group == "muon" else ("master", "exp_avg", "exp_avg_sq")


def parameter_groups(gpt: GPT, optimizer: OptimizerConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters by group."""
    # Stage 3 takes the shapes of its parameters away and keeps them here.
    shaped = ((name, getattr(p, "ds_shape", p.shape), p) for name, p in gpt.named_parameters())
    return by_group(shaped, gpt.model, optimizer)


def hyperparameters(group: str, optimizer: OptimizerConfig, model: ModelConfig) -> dict[str, Any]:
    """How a group is updated: its weight decay, the factor of its learning rate, what its rule needs.

    muP (Yang et al. 2022, arXiv:2203.03466, table 8, Adam): the rate of hidden matrices falls with the
    width. Their decay, which torch multiplies by the rate, rises by as much, so that weights shrink at one
    pace whatever the width, without which rates do not carry over (Kosson et al. 2025, arXiv:2510.19093).
    """
    decay = 0.0 if group == "no_decay" else optimizer.weight_decay
    ratio = model.width_ratio if group == "hidden" else 1.0
    shared = {"weight_decay": decay * ratio, "lr_multiplier": 1 / ratio}
    if group == "muon":
        return {"momentum": optimizer.momentum, **shared}
    return {"betas": optimizer.betas, "eps": optimizer.eps, **shared}


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
