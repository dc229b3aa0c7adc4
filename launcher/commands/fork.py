"""`launch --from RUN_DIR[@STEP]`: a new run that starts from another run's checkpoint.

The new run takes over the weights, the optimizer state and the step. Its own config decides everything else:
schedule, data, batch. The files are verified completely, then hard-linked if the file system allows it, else
copied.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import CheckpointError, ConfigError
from gpt.checkpoint.format import (
    CheckpointIndex,
    committed,
    rank_tensors,
    read_index,
    verify,
    verify_file,
)
from gpt.checkpoint.writer import commit, temporary_folder
from gpt.config.resume_rules import config_fingerprint
from gpt.config.run import RunConfig
from gpt.optimizer.parameter_groups import misfits, parameter_entries, states
from gpt.run import record
from gpt.run.events import Event
from gpt.run.run_dir import RunDir
from launcher.runs.store import open_run


@dataclass(frozen=True)
class Origin:
    """A verified checkpoint of another run."""

    folder: Path
    index: CheckpointIndex

    @property
    def event(self) -> dict[Event, dict[str, Any]]:
        """The event with which the new run begins."""
        return {Event.FORKED: {"run": self.folder.parent.parent.name, "step": self.index.step}}


def find_origin(text: str, config: RunConfig) -> Origin:
    """The checkpoint that `RUN_DIR[@STEP]` names, verified byte by byte.

    Raises ConfigError when it does not exist, is corrupt, or does not fit `config`.
    """
    name, at, number = text.rpartition("@")
    step = int(number) if at and number.isdigit() else None
    run = open_run(name if step is not None else text)
    steps: Mapping[int, Path] = dict(committed(run.checkpoints))
    if not steps:
        raise ConfigError(f"--from {text}: {run.path} has no checkpoint yet.")
    folder = steps.get(max(steps) if step is None else step)
    if folder is None:
        known = ", ".join(map(str, steps))
        raise ConfigError(f"--from {text}: there is no checkpoint of step {step}. Available steps: {known}.")
    for bad in verify(folder):
        raise ConfigError(f"--from {text}: {bad.path}: byte {bad.offset}: {bad.reason}. Choose another step.")
    index = read_index(folder)
    if problems := state_misfits(index, config):
        raise ConfigError([f"--from {text}: {problem}" for problem in problems])
    if index.step >= config.total_steps:
        raise ConfigError(
            f"--from {text}: step {index.step} is not before the end of the new run, schedule.total_steps = "
            f"{config.total_steps}. Raise it, or choose an earlier step."
        )
    return Origin(folder, index)


def state_misfits(index: CheckpointIndex, config: RunConfig) -> list[str]:
    """Why a run of `config` cannot continue from the state of a checkpoint, one sentence per problem."""
    entries = parameter_entries(config.model, config.optimizer)
    return misfits(index, entries, {entry.group: states(entry.group, config.optimizer) for entry in entries})


def seed_checkpoint(origin: Origin, run: RunDir, config: RunConfig, data_fingerprint: str) -> None:
    """Make `origin` the first checkpoint of the new run, under the new run's config and data."""
    temporary = temporary_folder(run.checkpoints, 0, origin.index.step)
    temporary.mkdir()
    for rank, entry in enumerate(origin.index.files):
        _share(origin, rank, temporary / entry.name)
    # Skipped sequence numbers refer to the data that they were read from.
    skipped = origin.index.skipped if origin.index.data_fingerprint == data_fingerprint else ()
    index = origin.index.for_new_run(
        data_fingerprint=data_fingerprint, config_fingerprint=config_fingerprint(config), skipped=skipped
    )
    commit(run.checkpoints, temporary, index)


def _share(origin: Origin, rank: int, target: Path) -> None:
    """Link or copy a file of `origin` to `target`. Raises CheckpointError when a copy differs."""
    entry = origin.index.files[rank]
    try:
        target.hardlink_to(origin.folder / entry.name)
        return
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(origin.folder / entry.name, target)
    record.sync(target)
    for bad in verify_file(target, entry, rank_tensors(origin.index, rank), origin.index.chunk_bytes):
        raise CheckpointError(
            f"{target} differs from its source in {origin.folder}: byte {bad.offset}: {bad.reason}. "
            "Check the disk, then launch with another --run-dir."
        )
