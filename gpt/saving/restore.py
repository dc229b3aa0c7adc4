"""Loads a run's state from its newest intact checkpoint, agreed between the ranks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import CheckpointError, ConfigError
from gpt.checkpoint.format import CheckpointIndex, Corrupt, committed
from gpt.checkpoint.patience import Unreadable
from gpt.checkpoint.reader import CheckpointReader
from gpt.config.resume_rules import config_fingerprint
from gpt.distributed.world import World, agree, from_first, gather
from gpt.distributed.zero.engine import Engine
from gpt.model.hardware import is_cpu
from gpt.optimizer.parameter_groups import misfits
from gpt.run.events import Event, earlier_config_fingerprints, read_events
from gpt.run.run_dir import RunDir
from gpt.saving.candidates import Candidates


@dataclass(frozen=True)
class _Identity:
    """The fingerprints by which a checkpoint belongs to this run."""

    data: str
    configs: Collection[str]  # the config now, and before each change that was allowed


def has_begun(run_dir: RunDir) -> bool:
    """Whether the run has or had a checkpoint. It then continues from one, or not at all."""
    return bool(committed(run_dir.checkpoints)) or any(
        True for _ in read_events(run_dir.events, Event.CHECKPOINT_SAVED, Event.FORKED, Event.IMPORTED)
    )


def load_newest(
    run_dir: RunDir, engine: Engine, world: World, data_fingerprint: str, *, is_begun: bool
) -> CheckpointIndex | None:
    """Fill `engine` from the newest intact checkpoint; its index, or None for a run that has not begun.

    Collective. `is_begun` is the value of `has_begun` on rank 0 before the model was built. A checkpoint is
    corrupt when a rank finds a bad byte in what it reads; it is reported, skipped and rejected. Raises
    CheckpointError when the run has had checkpoints and none is intact.
    """
    candidates = Candidates(run_dir, world, engine.run.checkpoint.mirror)
    found = candidates.committed()
    earlier = from_first(world, earlier_config_fingerprints(run_dir.events) if world.is_first else set())
    identity = _Identity(data_fingerprint, {config_fingerprint(engine.run), *earlier})
    index = _load_any(found, candidates, engine, world, identity)
    if index is None and candidates.fetch_newest():
        index = _load_any(candidates.committed(), candidates, engine, world, identity)
    if index is not None:
        return index
    if is_begun or found:
        raise CheckpointError(
            f"{run_dir.checkpoints}: the run has had checkpoints and none is intact. It does not start again "
            "from step 0 by itself: restore a checkpoint there, or launch a new run."
        )
    return None


def _load_any(
    found: Sequence[tuple[int, Path]],
    candidates: Candidates,
    engine: Engine,
    world: World,
    identity: _Identity,
) -> CheckpointIndex | None:
    """Fill `engine` from the newest intact checkpoint of `found`.

    A corrupt one is fetched again from the mirror, if it is intact there, before an older one is tried.
    """
    rejected: list[Path] = []
    for step, folder in reversed(found):
        loaded = _load(folder, engine, world, identity)
        if isinstance(loaded, str):
            candidates.note_corrupt(folder, loaded)
            if candidates.fetch_again(step):
                loaded = _load(folder, engine, world, identity)
        if isinstance(loaded, CheckpointIndex):
            candidates.continue_from(step, folder, rejected)
            return loaded
        rejected.append(folder)
    return None


def _load(folder: Path, engine: Engine, world: World, identity: _Identity) -> CheckpointIndex | str:
    """Fill `engine` from one checkpoint; its index, or the reason when it is corrupt."""

    def attempt() -> CheckpointIndex | str:
        try:
            reader = CheckpointReader(folder)
            _check_fits(reader.index, engine, identity)
            engine.prepare_load(reader.index.optimizer_steps)
            engine.load_scalars(reader.index.scalars)
            for part in engine.state():
                where = part.group, part.state, part.start, part.end
                if is_cpu(part.tensor.device) and part.tensor.dtype == torch.float32:
                    reader.read(*where, out=part.tensor.detach().numpy())  # without a copy in between
                else:
                    part.tensor.copy_(torch.from_numpy(reader.read(*where)))
        except Corrupt as error:
            return str(error)
        except Unreadable as error:  # a crash: the next attempt reads it again, perhaps on another node
            raise OSError(str(error)) from error
        return reader.index

    loaded = agree(world, attempt)
    reasons = gather(world, loaded if isinstance(loaded, str) else None)
    corrupt = next((reason for reason in reasons if reason is not None), None)
    if corrupt is None:
        engine.finish_load()
    return corrupt or loaded


def _check_fits(index: CheckpointIndex, engine: Engine, identity: _Identity) -> None:
    """Raise ConfigError when the checkpoint belongs to another model, other data or another config."""
    problems = misfits(index, engine.parameters, {group.name: group.states for group in engine.groups})
    if index.data_fingerprint not in (identity.data, *engine.run.data.changed_from):
        problems.append(
            f"it was trained on data {index.data_fingerprint}, the config's data is {identity.data}"
        )
    if not problems and index.config_fingerprint not in identity.configs:
        problems.append(
            f"it was saved under another config ({index.config_fingerprint}) than the run's own "
            f"({' or '.join(sorted(identity.configs))}): config.json was edited, or the checkpoint put there "
            "by hand. Restore it, or accept it with `outlast resume --allow-change config`"
        )
    if problems:
        raise ConfigError([f"step {index.step} does not fit this run: {problem}" for problem in problems])
