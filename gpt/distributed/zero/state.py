"""This rank's part of the fp32 state: one class for each way in which ZeRO shards it.

Private in DeepSpeed 0.19 and used here. Stages 1 and 2: `_hp_mapping` of a parameter, `update_lp_params`, and
the flat fp32 partition of each inner parameter group. Stage 3: `fp32_partitioned_groups_flat` and its 16-bit
twins, `fp16_groups`, `persistent_parameters` and `checkpoint_event_epilogue`.
tests/distributed/test_zero_contract.py fails when one of them changes its meaning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.checkpoint.layout import GroupLayout, Kind
from gpt.config.model import ModelConfig
from gpt.config.parameter_table import stacked_rows
from gpt.config.run import RunConfig
from gpt.distributed.world import World
from gpt.model.gpt import GPT
from gpt.optimizer.parameter_groups import hyperparameters, parameter_entries, sizes_by_group, states
from gpt.optimizer.whole_matrices import Fragment, ShardedMatrices


@dataclass(frozen=True)
class StatePart:
    """One state of a group on this rank in fp32: elements `start` to `end` of the group's flat vector."""

    group: str
    state: str
    start: int
    end: int
    tensor: Tensor


class FlatState:
    """Stages 1 and 2: each group is one flat vector, sharded into equal parts."""

    kind: Kind = "flat"

    def __init__(self, zero: Any, model: GPT, run: RunConfig, world: World) -> None:
        self._zero, self._model, self._world = zero, run.model, world
        self.partitions: list[Tensor] = [group["params"][0] for group in zero.optimizer.param_groups]
        sizes = [partition.numel() for partition in self.partitions]
        self.parameters, self.groups, self._layouts = _tables(self.kind, run, world, sizes)
        # The computed layout must match the one that DeepSpeed made.
        by_name = dict(model.named_parameters())
        starts = {group.name: self._layouts[group.name].extents(world.rank)[0][0] for group in self.groups}
        for entry in self.parameters:
            mapping = by_name[entry.name]._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                reported = starts[entry.group] + mapping.hp_fragment_address.start
                assert reported == entry.offset + mapping.lp_fragment_address.start, entry.name

    def parts(self) -> Iterator[StatePart]:
        """This rank's part of every state, without padding, in the order of its file."""
        for group, partition in zip(self.groups, self.partitions, strict=True):
            ((start, end),) = self._layouts[group.name].extents(self._world.rank)
            for state in group.states:
                flat = _state_of(self._zero.optimizer, partition, state)
                yield StatePart(group.name, state, start, end, flat[: end - start])

    def sharded_matrices(self, group: str) -> Iterator[tuple[Tensor, list[ShardedMatrices]]]:
        """Each fp32 partition of `group` with the parameters that have a shard in it."""
        layout = self._layouts[group]
        wholes = []
        for entry in (entry for entry in self.parameters if entry.group == group):
            pieces = layout.locate(entry.offset, entry.offset + entry.numel)
            places = [(piece.rank, piece.offset, piece.length) for piece in pieces]
            wholes.append(_whole(entry.name, self._model, entry.shape, places))
        yield self.partitions[[entry.name for entry in self.groups].index(group)], wholes

    def refresh_weights(self) -> None:
        """Copy the fp32 masters into the model's weights."""
        self._zero.update_lp_params()


class ShardedState:
    """Stage 3: each parameter is sharded into equal parts."""

    kind: Kind = "sharded"

    def __init__(self, zero: Any, model: GPT, run: RunConfig, world: World) -> None:
        self._zero, self._model, self._world = zero, run.model, world
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.partitions: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        sizes = [1] * len(zero.optimizer.param_groups)
        self.parameters, self.groups, self._layouts = _tables(self.kind, run, world, sizes)

    def parts(self) -> Iterator[StatePart]:
        """This rank's part of every state, without padding, in the order of its file."""
        where = {name: (partition, at) for name, partition, at in self._places()}
        for group in self.groups:
            members = [entry for entry in self.parameters if entry.group == group.name]
            extents = self._layouts[group.name].extents(self._world.rank)
            for state in group.states:
                for entry, (start, end) in zip(members, extents, strict=True):
                    partition, at = where[entry.name]
                    flat = _state_of(self._zero.optimizer, partition, state)
                    yield StatePart(group.name, state, start, end, flat[at : at + end - start])

    def _places(self) -> Iterator[tuple[str, Tensor, int]]:
        """Each parameter with the fp32 partition that holds its shard, and the offset of the shard there."""
        for partition, members in zip(self.partitions, self._zero.fp16_groups, strict=True):
            at = 0
            for parameter in members:
                yield self._names[id(parameter)], partition, at
                at += -(-parameter.ds_numel // self._world.size)

    def sharded_matrices(self, group: str) -> Iterator[tuple[Tensor, list[ShardedMatrices]]]:
        """Each fp32 partition of `group` with the parameters that have a shard in it."""
        entries = {entry.name: entry for entry in self.parameters if entry.group == group}
        wholes: dict[Tensor, list[ShardedMatrices]] = {}
        for name, partition, at in self._places():
            if name not in entries:
                continue
            shard = -(-entries[name].numel // self._world.size)
            sizes = [
                max(0, min(shard, entries[name].numel - rank * shard)) for rank in range(self._world.size)
            ]
            places = [(rank, at, size) for rank, size in enumerate(sizes)]
            whole = _whole(name, self._model, entries[name].shape, places)
            wholes.setdefault(partition, []).append(whole)
        yield from wholes.items()

    def refresh_weights(self) -> None:
        """Copy the fp32 masters into the model's weights."""
        zero = self._zero
        for i, flat in enumerate(zero.fp16_partitioned_groups_flat):
            flat.data.copy_(zero.fp32_partitioned_groups_flat[i].data)
            views = zero.unflatten(flat, zero.fp16_partitioned_groups[i])
            for part, view in zip(zero.fp16_partitioned_groups[i], views, strict=True):
                part.data = view.data
        if zero.persistent_parameters:  # every rank keeps small ones whole: shard and gather them again
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()


def _state_of(optimizer: torch.optim.Optimizer, partition: Tensor, state: str) -> Tensor:
    """One state of a partition, flat; zeros before the first update."""
    if state == "master":
        return partition.data
    moments = optimizer.state.get(partition) or {}
    return moments[state] if state in moments else torch.zeros_like(partition.data)


def _whole(
    name: str, model: ModelConfig, shape: tuple[int, ...], places: Sequence[tuple[int, int, int]]
) -> ShardedMatrices:
    """A parameter for an optimizer that needs whole matrices."""
    rows = stacked_rows(model, name, shape[0])
    assert sum(rows) == shape[0], name
    return ShardedMatrices(rows, shape[1], tuple(Fragment(*place) for place in places if place[2]))


def _tables(
    kind: Kind, run: RunConfig, world: World, partition_numels: list[int]
) -> tuple[tuple[ParameterEntry, ...], tuple[GroupEntry, ...], dict[str, GroupLayout]]:
    """Parameters, groups and layouts, computed from the config."""
    parameters = parameter_entries(run.model, run.optimizer)
    groups: list[GroupEntry] = []
    layouts = {}
    for (name, sizes), partition_numel in zip(
        sizes_by_group(parameters).items(), partition_numels, strict=True
    ):
        groups.append(
            GroupEntry(
                name=name,
                numel=sum(sizes),
                partition_numel=partition_numel,
                states=states(name, run.optimizer),
                hyperparameters=hyperparameters(name, run.optimizer, run.model),
            )
        )
        layouts[name] = GroupLayout(kind, world.size, sizes, partition_numel)
    return parameters, tuple(groups), layouts
