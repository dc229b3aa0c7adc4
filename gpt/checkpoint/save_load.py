"""Taking a run's state out to disk and back, agreed between the ranks."""

import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import CheckpointError, ConfigError
from data_pipeline.skip_list import Ranges
from gpt.attempt import Superseded, is_superseded
from gpt.checkpoint.format import CheckpointIndex, Corrupt, FileEntry, committed, verify_rank
from gpt.checkpoint.reader import CheckpointReader
from gpt.checkpoint.writer import (
    commit,
    prune,
    set_aside,
    temporary_folder,
    write_rank_file,
)
from gpt.distributed import World, from_first, gather, together
from gpt.record import event, read
from gpt.run_dir import RunDir
from gpt.zero import Engine


def save(
    run_dir: RunDir,
    engine: Engine,
    world: World,
    *,
    step: int,
    attempt: int,
    data_fingerprint: str,
    skipped: Ranges = (),
) -> None:
    """Commit the state after `step`, verified, and prune older ones. Collective.

    Raises CheckpointError on every rank when one of them cannot write; older checkpoints then stand, and
    what was written of this one is gone.
    """
    started = time.monotonic()
    temporary = temporary_folder(run_dir.checkpoints, attempt, step)
    try:
        size = _write_and_commit(run_dir, engine, world, temporary, step, attempt, data_fingerprint, skipped)
    except CheckpointError:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    if world.is_first:
        seconds = round(time.monotonic() - started, 3)
        event(run_dir.events, "checkpoint_saved", step=step, seconds=seconds, bytes=size, verified=True)
        try:
            prune(run_dir.checkpoints, engine.run.checkpoint.keep_last)
        except OSError as error:
            event(run_dir.events, "prune_failed", reason=str(error))


def _write_and_commit(
    run_dir: RunDir,
    engine: Engine,
    world: World,
    temporary: Path,
    step: int,
    attempt: int,
    data_fingerprint: str,
    skipped: Ranges,
) -> int:
    """The bytes of the committed files."""
    together(world, _on_first(world, lambda: temporary.mkdir(parents=True)))
    entry = together(world, lambda: _write(temporary, engine, world))
    index = CheckpointIndex(
        step=step,
        attempt=attempt,
        world_size=world.size,
        stage=engine.run.zero.stage,
        layout=engine.layout,
        optimizer_steps=engine.optimizer_steps,
        skipped=skipped,
        parameters=engine.parameters,
        groups=engine.groups,
        data_fingerprint=data_fingerprint,
        versions={name: version(name) for name in ("torch", "deepspeed")},
        files=tuple(gather(world, entry)),
    )
    together(world, lambda: _read_back(temporary, index, world.rank))

    def finish() -> None:
        if is_superseded(run_dir, attempt):
            raise Superseded(f"attempt {attempt + 1} has started since: attempt {attempt} ends here.")
        commit(run_dir.checkpoints, temporary, index)

    together(world, _on_first(world, finish))
    return sum(file.size for file in index.files)


def load_newest(
    run_dir: RunDir, engine: Engine, world: World, data_fingerprint: str
) -> CheckpointIndex | None:
    """Fill `engine` from the newest intact checkpoint; its index, None where none was ever committed.

    Collective. A checkpoint with a bad byte in what any rank reads is named, passed over and set aside.
    Raises CheckpointError when there were checkpoints and none is intact.
    """
    candidates = from_first(world, committed(run_dir.checkpoints))
    rejected: list[Path] = []
    for step, folder in reversed(candidates):
        loaded = _load(folder, engine, world, data_fingerprint)
        if isinstance(loaded, CheckpointIndex):
            if world.is_first:
                for path in rejected:
                    set_aside(path)
                event(run_dir.events, "resumed", step=step, checkpoint=folder.name)
            return loaded
        rejected.append(folder)
        if world.is_first:
            event(run_dir.events, "checkpoint_rejected", path=folder.name, reason=loaded)
            print(f"checkpoint {folder.name} is passed over: {loaded}", flush=True)
    had_some = bool(candidates) or any(
        line.get("event") in ("checkpoint_saved", "branched") for line in read(run_dir.events)
    )
    if from_first(world, had_some):
        raise CheckpointError(
            f"{run_dir.checkpoints}: the run has had checkpoints and none is intact. It does not start from "
            "step 0 by itself: restore a checkpoint there, or launch a new run."
        )
    return None


def _load(folder: Path, engine: Engine, world: World, data_fingerprint: str) -> CheckpointIndex | str:
    """Fill `engine` from one checkpoint; its index, or why not, if a byte of it is bad."""

    def attempt() -> CheckpointIndex | str:
        try:
            reader = CheckpointReader(folder)
            _check_fits(reader.index, engine, data_fingerprint)
            engine.prepare_load(reader.index.optimizer_steps)
            for part in engine.state():
                content = reader.read(part.group, part.state, part.start, part.end)
                part.tensor.copy_(torch.from_numpy(content))
        except Corrupt as error:
            return str(error)
        return reader.index

    loaded = together(world, attempt)
    reasons = gather(world, loaded if isinstance(loaded, str) else None)
    bad = next((reason for reason in reasons if reason is not None), None)
    if bad is None:
        engine.finish_load()
    return bad or loaded


def _check_fits(index: CheckpointIndex, engine: Engine, data_fingerprint: str) -> None:
    """Raise ConfigError when the checkpoint belongs to another model or other data."""
    here = {entry.name: entry for entry in engine.parameters}
    there = {entry.name: entry for entry in index.parameters}
    problems = [
        f"parameter {name} is {_shape(there.get(name))} there and {_shape(here.get(name))} in the config"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if index.data_fingerprint != data_fingerprint:
        problems.append(
            f"it was trained on data {index.data_fingerprint}, the config's data is {data_fingerprint}"
        )
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ConfigError([f"step {index.step} does not fit this run: {p}" for p in problems[:5]] + more)


def _shape(entry: object) -> str:
    return "absent" if entry is None else str(list(getattr(entry, "shape", ())))


def _write(temporary: Path, engine: Engine, world: World) -> FileEntry:
    tensors: dict[str, list[NDArray[np.float32]]] = {}
    for part in engine.state():
        tensors.setdefault(f"{part.group}.{part.state}", []).append(part.tensor.cpu().numpy())
    try:
        return write_rank_file(temporary, world.rank, tensors)
    except OSError as error:
        raise CheckpointError(f"rank {world.rank} could not write its checkpoint: {error}") from error


def _read_back(temporary: Path, index: CheckpointIndex, rank: int) -> None:
    for bad in verify_rank(temporary, index, rank):
        raise Corrupt(bad)


def _on_first(world: World, action: Callable[[], object]) -> Callable[[], None]:
    """`action` on rank 0 and nothing on the others, with a failing disk as an error of ours."""

    def run() -> None:
        if world.is_first:
            try:
                action()
            except OSError as error:
                raise CheckpointError(f"the checkpoint could not be committed: {error}") from error

    return run
