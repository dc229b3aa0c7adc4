"""A small checkpoint as several ranks write it."""

from pathlib import Path
from typing import Any

import numpy as np

from gpt.checkpoint.format import CheckpointIndex, GroupEntry, ParameterEntry, rank_tensors
from gpt.checkpoint.layout import Kind
from gpt.checkpoint.writer import commit, temporary_folder, write_rank_file
from gpt.config.optimizer import OptimizerConfig
from gpt.config.resume_rules import config_fingerprint
from gpt.config.run import RunConfig
from gpt.optimizer.parameter_groups import parameter_entries, sizes_by_group, states

STATES = ("master", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 64


def flat_state(group: str, state: str, numel: int) -> np.ndarray:
    seed = sum(map(ord, group + state))
    return np.random.default_rng(seed).standard_normal(numel, dtype=np.float32)


def write_checkpoint(
    checkpoints: Path,
    step: int = 7,
    world_size: int = 3,
    numel: int = 101,
    layout: Kind = "flat",
    config: RunConfig | None = None,
    parameters: tuple[ParameterEntry, ...] = (),
    **fields: Any,
) -> Path:
    """A checkpoint placed on `world_size` ranks by `layout`, in equal parts.

    It holds the network of `config`, the `parameters`, or else two groups of a few numbers; `fields` are
    further fields of its index.
    """
    if parameters:
        pass
    elif config is not None:
        parameters = parameter_entries(config.model, config.optimizer)
        fields |= {"config_fingerprint": config_fingerprint(config), "chunk_bytes": 64 * CHUNK_BYTES}
    else:
        parameters = (
            ParameterEntry(name="w", shape=(numel - 11, 1), group="decay", offset=0),
            ParameterEntry(name="v", shape=(11,), group="decay", offset=numel - 11),
            ParameterEntry(name="g", shape=(5,), group="no_decay", offset=0),
        )
    groups = tuple(
        GroupEntry(
            name=name,
            numel=sum(sizes),
            partition_numel=-(-sum(sizes) // world_size),
            states=states(name, OptimizerConfig() if config is None else config.optimizer),
            hyperparameters={"weight_decay": 0.1, "betas": (0.9, 0.95)},
        )
        for name, sizes in sizes_by_group(parameters).items()
    )
    index = CheckpointIndex(
        step=step,
        attempt=1,
        world_size=world_size,
        stage=3 if layout == "sharded" else 1,
        layout=layout,
        optimizer_steps=step,
        parameters=parameters,
        groups=groups,
        **{
            "data_fingerprint": "d",
            "config_fingerprint": "c",
            "versions": {"torch": "2.13"},
            "chunk_bytes": CHUNK_BYTES,
            **fields,
        },
        files=(),
    )
    temporary = temporary_folder(checkpoints, attempt=1, step=step)
    temporary.mkdir(parents=True)
    files = []
    for rank in range(world_size):
        parts = (
            flat_state(group.name, state, group.numel)[start:end]
            for group in groups
            for state in group.states
            for start, end in index.layouts[group.name].extents(rank)
        )
        tensors = rank_tensors(index, rank)
        files.append(write_rank_file(temporary, rank, tensors, parts, index.chunk_bytes))
    return commit(checkpoints, temporary, index.model_copy(update={"files": tuple(files)}))
