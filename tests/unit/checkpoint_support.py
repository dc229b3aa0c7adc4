"""A small checkpoint as several ranks write it."""

from pathlib import Path

import numpy as np

from gpt.checkpoint.format import CheckpointIndex, GroupEntry, ParameterEntry, rank_tensors
from gpt.checkpoint.layout import Kind
from gpt.checkpoint.writer import commit, temporary_folder, write_rank_file

STATES = ("master", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 64


def flat_state(group: str, state: str, numel: int) -> np.ndarray:
    seed = sum(map(ord, group + state))
    return np.random.default_rng(seed).standard_normal(numel, dtype=np.float32)


def write_checkpoint(
    checkpoints: Path, step: int = 7, world_size: int = 3, numel: int = 101, layout: Kind = "flat"
) -> Path:
    """A checkpoint of two groups, cut over `world_size` ranks as ZeRO cuts it: padded to equal parts."""
    groups = tuple(
        GroupEntry(
            name=name,
            numel=size,
            partition_numel=-(-size // world_size),
            states=STATES,
            hyperparameters={"weight_decay": 0.1, "betas": (0.9, 0.95)},
        )
        for name, size in (("decay", numel), ("no_decay", 5))
    )
    parameters = (
        ParameterEntry(name="w", shape=(numel - 11, 1), group="decay", offset=0),
        ParameterEntry(name="v", shape=(11,), group="decay", offset=numel - 11),
        ParameterEntry(name="g", shape=(5,), group="no_decay", offset=0),
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
        data_fingerprint="d",
        config_fingerprint="c",
        versions={"torch": "2.13"},
        chunk_bytes=CHUNK_BYTES,
        files=(),
    )
    temporary = temporary_folder(checkpoints, attempt=1, step=step)
    temporary.mkdir(parents=True)
    files = []
    for rank in range(world_size):
        parts = (
            flat_state(group.name, state, group.numel)[start:end]
            for group in groups
            for state in STATES
            for start, end in index.layouts[group.name].extents(rank)
        )
        tensors = rank_tensors(index, rank)
        files.append(write_rank_file(temporary, rank, tensors, parts, CHUNK_BYTES))
    return commit(checkpoints, temporary, index.model_copy(update={"files": tuple(files)}))
