"""One save as a state machine: written by every rank, then committed by rank 0, or discarded.

All ranks are in the same phase at the same step boundary:

    WRITING     each rank's thread writes its file, fsyncs it and reads it back
    GATHERING   the ranks send rank 0 what the index says about their files
    COMMITTING  rank 0's thread fsyncs the record, writes the index, renames the folder and prunes
    DISCARDING  instead, when a rank failed or the save is no longer wanted: each rank removes its file
    ENDED
"""

import struct
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import CheckpointIndex, FileEntry, rank_name
from gpt.checkpoint.writer import Pace, discard
from gpt.distributed.world import PendingGather, World, gather
from gpt.saving.background_task import BackgroundTask


class Phase(Enum):
    """How far a save is; see the module."""

    WRITING = auto()
    GATHERING = auto()
    COMMITTING = auto()
    DISCARDING = auto()
    ENDED = auto()


class SaveInFlight:
    """A save as this rank sees it. All ranks call `advance` and `discard` together."""

    def __init__(self, world: World, index: CheckpointIndex, folder: Path, pace: Pace) -> None:
        """`index` lists no files yet; `folder` is the temporary folder that the ranks write to."""
        self.index, self.folder, self.pace = index, folder, pace
        self.started = time.monotonic()
        self.stall_s = 0.0
        self.phase = Phase.WRITING
        self.is_finite = True  # this rank's master weights; its thread finds out
        self.ranks_not_finite: list[int] = []  # once the ranks have told each other
        self.task: BackgroundTask | None = None
        self._world = world
        self._entries: PendingGather | None = None

    def start_writing(self, write: Callable[[], FileEntry]) -> None:
        """Start this rank's writing in the background; what happened since the save began was the stall."""
        self.stall_s = time.monotonic() - self.started
        self.task = BackgroundTask(write, self._world.device)

    def report(self) -> tuple[bool, bool]:
        """Whether this rank has done its part of the phase, and whether it failed."""
        is_done = self.task is not None and self.task.is_done()
        return is_done, is_done and self.task is not None and self.task.error is not None

    def advance(
        self, done: float, failed: float, commit: Callable[[CheckpointIndex], None]
    ) -> CheckpointError | None:
        """Go on with the reports summed over the ranks; the error if the save fails by it.

        `commit` is called in rank 0's background thread with the complete index.
        """
        match self.phase:
            case Phase.WRITING | Phase.COMMITTING if failed:
                error = self.task.error if self.task is not None and self.task.is_done() else None
                first = next(e for e in gather(self._world, error) if e is not None)
                self.discard()
                return first
            case Phase.WRITING if done == self._world.size:
                assert self.task is not None and self.task.entry is not None
                numbers = *_as_integers(self.task.entry), int(self.is_finite)
                self._entries = PendingGather(self._world, *numbers)
                self.phase, self.task = Phase.GATHERING, None
            case Phase.GATHERING:
                assert self._entries is not None
                entries = list(enumerate(self._entries.result()))
                self.ranks_not_finite = [rank for rank, (*_, is_finite) in entries if not is_finite]
                index = self.index.with_files(tuple(_as_entry(rank, values[:3]) for rank, values in entries))
                self.phase = Phase.COMMITTING
                is_first, device = self._world.is_first, self._world.device
                self.task = BackgroundTask(lambda: commit(index), device) if is_first else None
            case Phase.COMMITTING if done:
                self.phase = Phase.ENDED
            case Phase.DISCARDING if done == self._world.size:
                self.phase = Phase.ENDED
        return None

    def discard(self) -> None:
        """Cancel the save; each rank removes its file once its thread has ended."""
        writing = self.task
        self.pace.cancel()

        def remove() -> None:
            if writing is not None:
                writing.wait()
            discard(self.folder, self._world.rank)

        self.phase, self.task = Phase.DISCARDING, BackgroundTask(remove, self._world.device)


def _as_integers(entry: FileEntry) -> tuple[int, int, int]:
    """Size and checksum of a file as integers of 64 bits, which fit in a tensor."""
    size, high, low = struct.unpack("<qqq", struct.pack("<q", entry.size) + bytes.fromhex(entry.checksum))
    return size, high, low


def _as_entry(rank: int, values: tuple[int, ...]) -> FileEntry:
    size, high, low = values
    return FileEntry(name=rank_name(rank), size=size, checksum=struct.pack("<qq", high, low).hex())
