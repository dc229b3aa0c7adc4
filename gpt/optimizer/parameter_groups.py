"""The parameter groups of a run, and whether a checkpoint has the same ones. Torch-free."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gpt.checkpoint.format import CheckpointIndex, ParameterEntry
from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig
from gpt.config.parameter_table import parameter_table

T = TypeVar("T")
_LISTED = 5  # parameters that an error names one by one


def by_group(
    parameters: Iterable[tuple[str, tuple[int, ...], T]], model: ModelConfig, optimizer: OptimizerConfig
) -> dict[str, list[tuple[str, T]]]:
    """(name, shape, anything) by group, in the order of the optimizer's groups, without empty groups."""
    spec = optimizer.spec
    groups: dict[str, list[tuple[str, T]]] = {group.name: [] for group in spec.groups}
    for name, shape, value in parameters:
        groups[spec.group_of(name, shape, model)].append((name, value))
    return {group: members for group, members in groups.items() if members}


def states(group: str, optimizer: OptimizerConfig) -> tuple[str, ...]:
    """What is kept for each element of a group, in the order of a checkpoint."""
    return optimizer.spec.group(group).checkpointed_states


def hyperparameters(group: str, optimizer: OptimizerConfig, model: ModelConfig) -> dict[str, Any]:
    """The weight decay of a group, the multiplier of its learning rate, and the fields its update reads.

    muP (Yang et al. 2022, arXiv:2203.03466, table 8, Adam): the rate of hidden matrices falls with the
    width. torch multiplies the decay by the rate, so the decay rises by the same factor: weights then shrink
    at one pace at every width, without which rates do not transfer (Kosson et al. 2025, arXiv:2510.19093).
    """
    spec = optimizer.spec.group(group)
    decay = optimizer.weight_decay if spec.has_weight_decay else 0.0
    ratio = model.width_ratio if spec.is_scaled_by_width else 1.0
    fields = {field: getattr(optimizer, field) for field in spec.fields}
    return {**fields, "weight_decay": decay * ratio, "lr_multiplier": 1 / ratio}


def parameter_entries(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[ParameterEntry, ...]:
    """Each parameter with its offset in the state of its group, group after group."""
    entries: list[ParameterEntry] = []
    table = ((name, shape, shape) for name, shape in parameter_table(model))
    for group, members in by_group(table, model, optimizer).items():
        offset = 0
        for name, shape in members:
            entries.append(ParameterEntry(name=name, shape=shape, group=group, offset=offset))
            offset += entries[-1].numel
    return tuple(entries)


def sizes_by_group(entries: Iterable[ParameterEntry]) -> dict[str, list[int]]:
    """The numbers of elements of each group's parameters, in order."""
    sizes: dict[str, list[int]] = {}
    for entry in entries:
        sizes.setdefault(entry.group, []).append(entry.numel)
    return sizes


def misfits(
    index: CheckpointIndex, parameters: Sequence[ParameterEntry], states_of: Mapping[str, Sequence[str]]
) -> list[str]:
    """Why a checkpoint's state does not fit `parameters` with the states of their groups, in sentences."""
    here, there = ({entry.name: entry for entry in entries} for entries in (parameters, index.parameters))
    kept = {group.name: group.states for group in index.groups}
    problems = []
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            problems.append(f"parameter {name} is {_shape(theirs)} there and {_shape(ours)} in the config")
        elif (before := _place(theirs, kept)) != (now := _place(ours, states_of)):
            problems.append(f"its optimizer keeps {name} {before}; this config wants it {now}")
    more = len(problems) - _LISTED
    return problems[:_LISTED] + ([f"{more} more parameters do not fit"] if more > 0 else [])


def _place(entry: ParameterEntry, states_of: Mapping[str, Sequence[str]]) -> str:
    names = ", ".join(states_of[entry.group])
    return f"in group {entry.group} from element {entry.offset} on, with states {names}"


def _shape(entry: ParameterEntry | None) -> str:
    return "absent" if entry is None else str(list(entry.shape))
