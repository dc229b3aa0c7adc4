"""The optimizer's parameter groups by rule, and whether a checkpoint has the same. Torch-free."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gpt.checkpoint.format import CheckpointIndex, ParameterEntry
from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig
from gpt.config.parameter_table import parameter_table

T = TypeVar("T")
_NAMED = 5  # of parameters that do not fit


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


def parameter_entries(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[ParameterEntry, ...]:
    """Where each parameter stands in the state of its group, group after group."""
    entries: list[ParameterEntry] = []
    table = ((name, shape, shape) for name, shape in parameter_table(model))
    for group, members in by_group(table, model, optimizer).items():
        offset = 0
        for name, shape in members:
            entries.append(ParameterEntry(name=name, shape=shape, group=group, offset=offset))
            offset += entries[-1].numel
    return tuple(entries)


def sizes_by_group(entries: Iterable[ParameterEntry]) -> dict[str, list[int]]:
    """The elements of each group's parameters, in order."""
    sizes: dict[str, list[int]] = {}
    for entry in entries:
        sizes.setdefault(entry.group, []).append(entry.numel)
    return sizes


def misfits(
    index: CheckpointIndex, parameters: Sequence[ParameterEntry], states_of: Mapping[str, Sequence[str]]
) -> list[str]:
    """Why the state of a checkpoint is not that of `parameters` and the states of their groups, in words."""
    here, there = ({entry.name: entry for entry in entries} for entries in (parameters, index.parameters))
    kept = {group.name: group.states for group in index.groups}
    problems = []
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            problems.append(f"parameter {name} is {_shape(theirs)} there and {_shape(ours)} in the config")
        elif (before := _place(theirs, kept)) != (now := _place(ours, states_of)):
            problems.append(f"its optimizer keeps {name} {before}; this config wants it {now}")
    more = len(problems) - _NAMED
    return problems[:_NAMED] + ([f"{more} more parameters do not fit"] if more > 0 else [])


def _place(entry: ParameterEntry, states_of: Mapping[str, Sequence[str]]) -> str:
    names = ", ".join(states_of[entry.group])
    return f"in group {entry.group} from element {entry.offset} on, with states {names}"


def _shape(entry: ParameterEntry | None) -> str:
    return "absent" if entry is None else str(list(entry.shape))
