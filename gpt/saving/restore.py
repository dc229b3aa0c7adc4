"""Taking a run's state back from disk, agreed between the ranks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import CheckpointError, ConfigError, OutlastError
from gpt.checkpoint.format import CheckpointIndex, Corrupt, committed
from gpt.checkpoint.mirror import Mirror
from gpt.checkpoint.reader import CheckpointReader
from gpt.checkpoint.writer import set_aside
from gpt.config.resume_rules import config_fingerprint
from gpt.distributed.world import World, agree, from_first, gather
from gpt.distributed.zero.engine import Engine
from gpt.optimizer.parameter_groups import misfits
from gpt.run.events import Event, earlier_config_fingerprints, read_events, record_event
from gpt.run.run_dir import RunDir


@dataclass(frozen=True)
class _Belonging:
    """What tells whether a checkpoint is of this run."""

    data: str  # the fingerprint of its data
    configs: Collection[str]  # those of its config, now and before changes that were allowed


def has_begun(run_dir: RunDir) -> bool:
    """Whether the run has or had a checkpoint: it continues from one then, or not at all."""
    return bool(committed(run_dir.checkpoints)) or any(
        True for _ in read_events(run_dir.events, Event.CHECKPOINT_SAVED, Event.FORKED, Event.IMPORTED)
    )


def load_newest(
    run_dir: RunDir, engine: Engine, world: World, data_fingerprint: str, *, is_begun: bool
) -> CheckpointIndex | None:
    """Fill `engine` from the newest intact checkpoint; its index, None where the run is not begun.

    Collective; `is_begun` is what `has_begun` said to rank 0 before the network was built. A checkpoint with
    a bad byte in what any rank reads is named, passed over and set aside. Raises CheckpointError when there
    were checkpoints and none is intact.
    """
    candidates = from_first(world, committed(run_dir.checkpoints))
    earlier = from_first(world, earlier_config_fingerprints(run_dir.events) if world.is_first else set())
    belongs = _Belonging(data_fingerprint, {config_fingerprint(engine.run), *earlier})
    index = _load_any(candidates, run_dir, engine, world, belongs)
    if index is None and engine.run.checkpoint.mirror is not None:
        is_taken = _take_from_mirror(run_dir, engine.run.checkpoint.mirror) if world.is_first else False
        if from_first(world, is_taken):
            fetched = from_first(world, committed(run_dir.checkpoints))
            index = _load_any(fetched, run_dir, engine, world, belongs)
    if index is not None:
        return index
    if is_begun or candidates:
        raise CheckpointError(
            f"{run_dir.checkpoints}: the run has had checkpoints and none is intact. It does not start from "
            "step 0 by itself: restore a checkpoint there, or launch a new run."
        )
    return None


def _load_any(
    candidates: Sequence[tuple[int, Path]],
    run_dir: RunDir,
    engine: Engine,
    world: World,
    belongs: _Belonging,
) -> CheckpointIndex | None:
    """Fill `engine` from the newest intact one of `candidates`; newer ones, all bad, are set aside.

    A bad one is taken from the mirror anew, where that has it, before an older one is.
    """
    rejected: list[Path] = []
    mirror = engine.run.checkpoint.mirror
    for step, folder in reversed(candidates):
        loaded = _load(folder, engine, world, belongs)
        if isinstance(loaded, str):
            if world.is_first:
                record_event(run_dir.events, Event.CHECKPOINT_REJECTED, path=folder.name, reason=loaded)
                print(f"checkpoint {folder.name} is passed over: {loaded}", flush=True)
            if mirror is not None:
                is_taken = _take_again(run_dir, mirror, step) if world.is_first else False
                if from_first(world, is_taken):
                    loaded = _load(folder, engine, world, belongs)
        if isinstance(loaded, CheckpointIndex):
            if world.is_first:
                for path in rejected:
                    set_aside(path)
                if rejected and mirror is not None:
                    _set_later_aside(run_dir, mirror, step)
                record_event(run_dir.events, Event.RESUMED, step=step, checkpoint=folder.name)
            return loaded
        rejected.append(folder)
    return None


def _take_again(run_dir: RunDir, place: str, step: int) -> bool:
    """Bring the mirror's copy of `step` here in the place of a bad one, if it has an intact one."""
    try:
        mirror = Mirror.of(run_dir, place)
        mirror.check_owner(run_dir)
        if step not in mirror.steps():
            return False
        mirror.fetch(step, run_dir.checkpoints)
    except OutlastError as error:
        print(f"step {step} is not taken from the mirror: {error}", flush=True)
        return False
    _say_taken(run_dir, mirror, step)
    return True


def _set_later_aside(run_dir: RunDir, place: str, step: int) -> None:
    """The run goes on from `step`: what the mirror has of its earlier course is not its newest any more."""
    try:
        mirror = Mirror.of(run_dir, place)
        mirror.check_owner(run_dir)
        mirror.set_later_aside(step)
    except OutlastError as error:
        print(f"what the mirror has after step {step} stays there: {error}", flush=True)


def _take_from_mirror(run_dir: RunDir, place: str) -> bool:
    """Bring the newest intact checkpoint at the mirror here, where no checkpoint is intact."""
    try:
        mirror = Mirror.of(run_dir, place)
        mirror.check_owner(run_dir)
        if mirror.steps():
            for _, folder in committed(run_dir.checkpoints):
                set_aside(folder)
        step = mirror.fetch_newest(run_dir.checkpoints, lambda text: print(text, flush=True))
    except OutlastError as error:
        print(f"nothing is taken from the mirror: {error}", flush=True)
        return False
    if step is not None:
        _say_taken(run_dir, mirror, step)
    return step is not None


def _say_taken(run_dir: RunDir, mirror: Mirror, step: int) -> None:
    record_event(run_dir.events, Event.TAKEN_FROM_MIRROR, step=step, mirror=mirror.place)
    print(f"the checkpoint of step {step} is taken from the mirror {mirror.place}", flush=True)


def _load(folder: Path, engine: Engine, world: World, belongs: _Belonging) -> CheckpointIndex | str:
    """Fill `engine` from one checkpoint; its index, or why not, if a byte of it is bad."""

    def attempt() -> CheckpointIndex | str:
        try:
            reader = CheckpointReader(folder)
            _check_fits(reader.index, engine, belongs)
            engine.prepare_load(reader.index.optimizer_steps)
            engine.load_scalars(reader.index.scalars)
            for part in engine.state():
                where = part.group, part.state, part.start, part.end
                if part.tensor.device.type == "cpu" and part.tensor.dtype == torch.float32:
                    reader.read(*where, out=part.tensor.detach().numpy())  # no copy in between
                else:
                    part.tensor.copy_(torch.from_numpy(reader.read(*where)))
        except Corrupt as error:
            return str(error)
        return reader.index

    loaded = agree(world, attempt)
    reasons = gather(world, loaded if isinstance(loaded, str) else None)
    bad = next((reason for reason in reasons if reason is not None), None)
    if bad is None:
        engine.finish_load()
    return bad or loaded


def _check_fits(index: CheckpointIndex, engine: Engine, belongs: _Belonging) -> None:
    """Raise ConfigError when the checkpoint belongs to another model, other data or another config."""
    problems = misfits(index, engine.parameters, {group.name: group.states for group in engine.groups})
    if index.data_fingerprint not in (belongs.data, *engine.run.data.changed_from):
        problems.append(
            f"it was trained on data {index.data_fingerprint}, the config's data is {belongs.data}"
        )
    if not problems and index.config_fingerprint not in belongs.configs:
        problems.append(
            f"it was saved under another config ({index.config_fingerprint}) than the run's own "
            f"({' or '.join(sorted(belongs.configs))}): config.json was edited, or the checkpoint put there "
            "by hand. Restore it, or insist with `outlast resume --allow-change config`"
        )
    if problems:
        raise ConfigError([f"step {index.step} does not fit this run: {problem}" for problem in problems])
