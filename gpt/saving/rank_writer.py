"""Writes one rank's file of each save, from a copy in host memory or, without one, from the live state."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.failpoints import reach
from gpt.checkpoint.format import CheckpointIndex, FileEntry, rank_tensors
from gpt.checkpoint.writer import make_temporary_folder, read_back, write_rank_file
from gpt.config.optimizer_spec import MASTER
from gpt.distributed.world import World, total
from gpt.distributed.zero.engine import Engine
from gpt.run.events import Event, record_event
from gpt.run.host_memory import LARGEST_SHARE, available_bytes
from gpt.run.run_dir import RunDir
from gpt.saving.save_in_flight import SaveInFlight
from gpt.saving.snapshot import Snapshot, live_parts


class RankWriter:
    """What one rank writes. Without a snapshot, training has to wait until the file is written."""

    def __init__(self, run_dir: RunDir, engine: Engine, world: World, index: CheckpointIndex) -> None:
        """Collective. Host memory for the copy is allocated here, if every node has enough of it."""
        self._engine, self._world = engine, world
        self._tensors = rank_tensors(index, world.rank)
        ends = list(accumulate(self._tensors.values()))
        self._masters = [  # where they are in the concatenated state
            (end - numel, end)
            for (name, numel), end in zip(self._tensors.items(), ends, strict=True)
            if name.endswith(f".{MASTER}")
        ]
        self.snapshot = self._make_snapshot(run_dir) if engine.run.checkpoint.asynchronous else None

    def copy_state(self) -> None:
        """Copy this rank's state to host memory, if it is to be written from there."""
        if self.snapshot is not None:
            self.snapshot.take(self._engine.state())
            if self.snapshot.is_queued:
                self._engine.before_next_update(self.snapshot.hold_update)
        reach("copied")

    def write(self, save: SaveInFlight) -> FileEntry:
        """Write this rank's file and read it back. Raises CheckpointError."""
        parts = self.snapshot.parts() if self.snapshot is not None else live_parts(self._engine.state())
        try:
            make_temporary_folder(save.folder)
            reach("folder_made")
            if self._world.is_first:
                _check_disk_space(save)
            checked = self._checked(parts, save)
            entry = write_rank_file(save.folder, self._world.rank, self._tensors, checked, pace=save.pace)
            read_back(save.folder, entry, self._tensors, pace=save.pace)
            reach("read_back")
        except OSError as error:
            raise CheckpointError(f"rank {self._world.rank} cannot write its checkpoint: {error}") from error
        return entry

    def _checked(
        self, parts: Iterable[NDArray[np.float32]], save: SaveInFlight
    ) -> Iterator[NDArray[np.float32]]:
        """`parts` as they are; notes in `save` whether the master weights among them are finite."""
        start = 0
        for part in parts:
            for first, end in self._masters:
                if save.is_finite:
                    save.is_finite = is_finite(part[max(0, first - start) : max(0, end - start)])
            start += len(part)
            yield part

    def stall_s(self, save: SaveInFlight, seconds: float) -> float:
        """How long the save held up the training, once it took `seconds` in all."""
        return save.stall_s + self.snapshot.device_seconds() if self.snapshot is not None else seconds

    def _make_snapshot(self, run_dir: RunDir) -> Snapshot | None:
        numel = sum(self._tensors.values())
        needed, available = 4 * numel * self._world.local_size, available_bytes()
        (short,) = total(self._world, needed > LARGEST_SHARE * available)
        if not short:
            return Snapshot(numel, self._world.device)
        if self._world.is_first:
            reason = (
                f"{short:.0f} of {self._world.size} ranks are on nodes without the memory for a copy of the "
                f"state; on this node it needs {needed >> 20} MiB, and {available >> 20} MiB are available"
            )
            record_event(run_dir.events, Event.SAVING_SYNCHRONOUSLY, reason=reason)
        return None


def is_finite(numbers: NDArray[np.float32]) -> bool:
    """Whether all `numbers` are finite. One pass over memory in the usual case.

    A sum is finite only if all its terms are; it may also overflow, in which case each number is looked at.
    """
    with np.errstate(all="ignore"):
        return bool(np.isfinite(numbers.sum(dtype=np.float32)) or np.isfinite(numbers).all())


def _check_disk_space(save: SaveInFlight) -> None:
    """Raise OSError before anything is written if the whole checkpoint would not fit on the disk."""
    needed = sum(4 * group.numel * len(group.states) for group in save.index.groups)
    free = shutil.disk_usage(save.folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: it needs {needed >> 20} MiB, and {free >> 20} MiB are free",
        )
