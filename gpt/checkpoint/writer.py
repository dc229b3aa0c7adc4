"""Writing a checkpoint: each rank its file, rank 0 the index, a rename as the commit.

The order is write, fsync, read back, index, fsync, rename, fsync of the folder; a kill at any point
leaves either the whole checkpoint or a `.tmp-` folder that the next start removes.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import fsync_folder, write_durably
from gpt.checkpoint.direct_io import DirectReader, DirectWriter
from gpt.checkpoint.failpoints import reach
from gpt.checkpoint.format import (
    CHUNK_BYTES,
    INDEX_NAME,
    CheckpointIndex,
    Corrupt,
    FileEntry,
    chunk_checksum,
    committed,
    frame_checksum,
    rank_header,
    rank_name,
    step_name,
    verify_file,
)
from gpt.run.run_dir import CORRUPT_PREFIX, UNCOMMITTED_PREFIX


class Cancelled(Exception):
    """A save that is not wanted any more."""


class Pace:
    """How far a save is, how fast it may go on, and whether it is still wanted; shared by two threads."""

    def __init__(self, max_mb_per_s: float | None = None, wake: threading.Event | None = None) -> None:
        """Once `wake` is set there is no limit any more."""
        self.bytes_done = 0
        self._bytes_per_s = max_mb_per_s * 1e6 if max_mb_per_s is not None else None
        self._started = time.monotonic()
        self._is_cancelled = False
        self._wake = wake or threading.Event()

    def advance(self, count: int) -> None:
        """Another `count` bytes are written or read back: wait if that was too fast. Raises Cancelled."""
        self.bytes_done += count
        if self._bytes_per_s is not None:
            self._wake.wait(max(0.0, self._started + self.bytes_done / self._bytes_per_s - time.monotonic()))
        if self._is_cancelled:
            raise Cancelled

    def hurry(self) -> None:
        """No limit from here on: somebody waits for it."""
        self._bytes_per_s = None
        self._wake.set()

    def cancel(self) -> None:
        """End the save at its next chunk."""
        self._is_cancelled = True
        self._wake.set()


def temporary_folder(checkpoints: Path, attempt: int, step: int) -> Path:
    """Where the ranks write before the commit."""
    return checkpoints / f"{UNCOMMITTED_PREFIX}{attempt:04d}-{step:08d}"


def write_rank_file(
    folder: Path,
    rank: int,
    tensors: Mapping[str, int],
    parts: Iterable[NDArray[np.float32]],
    chunk_bytes: int = CHUNK_BYTES,
    pace: Pace | None = None,
) -> FileEntry:
    """Write one rank's file durably; what the index says of it.

    `tensors` has the elements of each flat fp32 tensor; `parts` hold their content one after the other, in
    pieces of any size.
    """
    pace = pace or Pace()
    header, _, _ = rank_header(tensors, chunk_bytes)
    path = folder / rank_name(rank)
    checksums: list[int] = []
    with DirectWriter(path) as file:
        file.write(header)
        reach("header_written")
        for chunk in _chunks(parts, chunk_bytes):
            checksums.append(chunk_checksum(chunk))
            file.write(chunk)
            reach("chunk_written")
            pace.advance(len(chunk))
        table = np.array(checksums, dtype="<u8").tobytes()
        file.write(table)
        file.flush()
        reach("file_written")
        file.sync()
        reach("file_synced")
    return FileEntry(name=path.name, size=file.size, checksum=frame_checksum(header, table))


def _chunks(parts: Iterable[NDArray[np.float32]], chunk_bytes: int) -> Iterator[memoryview]:
    """The bytes of `parts`, joined and cut every `chunk_bytes`; copied only where a chunk spans parts."""
    pending = bytearray()
    for part in parts:
        view = np.ascontiguousarray(part, dtype="<f4").data.cast("B")
        while len(view):
            if not pending and len(view) >= chunk_bytes:
                yield view[:chunk_bytes]
                view = view[chunk_bytes:]
                continue
            room = chunk_bytes - len(pending)
            pending += view[:room]
            view = view[room:]
            if len(pending) == chunk_bytes:
                yield memoryview(bytes(pending))
                pending.clear()
    if pending:
        yield memoryview(bytes(pending))


def read_back(
    folder: Path,
    entry: FileEntry,
    tensors: Mapping[str, int],
    chunk_bytes: int = CHUNK_BYTES,
    pace: Pace | None = None,
) -> None:
    """Read a file that was just written, from the disk where the system allows it. Raises Corrupt."""
    path = folder / entry.name
    with path.open("rb") as file:  # what is still in the page cache would prove nothing about the disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    advance = (pace or Pace()).advance
    for bad in verify_file(path, entry, tensors, chunk_bytes, advance, open_file=DirectReader):
        raise Corrupt(bad)


def commit(checkpoints: Path, temporary: Path, index: CheckpointIndex) -> Path:
    """Write the index into `temporary` and rename it into place; the committed folder.

    Raises OSError when a file that the index lists is not there whole: the folder was cleared meanwhile.
    """
    for entry in index.files:
        size = (temporary / entry.name).stat().st_size
        if size != entry.size:
            raise OSError(f"{temporary / entry.name} has {size} bytes instead of {entry.size}")
    write_durably(temporary / INDEX_NAME, index.dumps())
    reach("index_written")
    final = checkpoints / step_name(index.step)
    if final.exists():  # it did not verify when this attempt started, or it would have been resumed from
        set_aside(final)
    temporary.rename(final)
    reach("renamed")
    fsync_folder(checkpoints)
    reach("committed")
    return final


def discard(temporary: Path, rank: int) -> None:
    """Remove what `rank` wrote of a save that is given up; the last rank to do so removes the folder."""
    with suppress(OSError):
        (temporary / rank_name(rank)).unlink(missing_ok=True)
        if rank == 0:
            for index in temporary.glob(f"*{INDEX_NAME}*"):
                index.unlink()
        temporary.rmdir()


def set_aside(folder: Path) -> Path:
    """Take a bad checkpoint out of the line without deleting it."""
    aside = folder.with_name(f"{CORRUPT_PREFIX}{folder.name}-{time.time_ns()}")
    folder.rename(aside)
    return aside


def prune(checkpoints: Path, keep: Collection[int], check: Callable[[], None] = lambda: None) -> list[int]:
    """Delete the committed checkpoints whose step is not one of `keep`; the steps that went.

    `check` raises when the caller may delete no more.
    """
    doomed = [(step, folder) for step, folder in committed(checkpoints) if step not in keep]
    for _, folder in doomed:
        check()
        # Renamed first: a kill in the middle of the deletion must not leave half a committed folder.
        trash = folder.with_name(f"{UNCOMMITTED_PREFIX}pruned-{folder.name}")
        folder.rename(trash)
        reach("prune_renamed")
        shutil.rmtree(trash)
        reach("pruned")
    return [step for step, _ in doomed]


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed attempts left half-written or half-deleted.

    Each is renamed first, so that an older copy of the run that still lives commits either the whole of
    its save or, when it comes too late, nothing.
    """
    for entry in checkpoints.glob(f"{UNCOMMITTED_PREFIX}*"):
        with suppress(OSError):  # it was committed at this very moment, or is deleted by somebody else
            trash = entry.with_name(f"{UNCOMMITTED_PREFIX}trash-{time.time_ns()}")
            entry.rename(trash)
            shutil.rmtree(trash)
