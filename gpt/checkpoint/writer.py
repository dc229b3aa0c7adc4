"""Writes a checkpoint: each rank writes its file, rank 0 writes the index, and a rename commits it.

The order is: write, fsync and read back the rank files; write and fsync the index; rename the folder; fsync
its parent. A kill at any point leaves either the whole checkpoint or a `.tmp-` folder, which the next start
removes.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
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
    frame_checksum,
    rank_header,
    rank_name,
    step_name,
    verify_file,
)
from gpt.checkpoint.removal import reject
from gpt.run.run_dir import UNCOMMITTED_PREFIX


class Cancelled(Exception):
    """The save was cancelled."""


class Pace:
    """The progress, speed limit and cancellation of a save, shared by two threads."""

    def __init__(self, max_mb_per_s: float | None = None, wake: threading.Event | None = None) -> None:
        """`wake` lifts the limit once it is set."""
        self.bytes_done = 0
        self._bytes_per_s = max_mb_per_s * 1e6 if max_mb_per_s is not None else None
        self._started = time.monotonic()
        self._is_cancelled = False
        self._wake = wake or threading.Event()

    def advance(self, count: int) -> None:
        """Count `count` more bytes as written or read back; wait if that was too fast. Raises Cancelled."""
        self.bytes_done += count
        if self._bytes_per_s is not None:
            self._wake.wait(max(0.0, self._started + self.bytes_done / self._bytes_per_s - time.monotonic()))
        if self._is_cancelled:
            raise Cancelled

    def lift_limit(self) -> None:
        """Go on at full speed, because the training waits for the save."""
        self._bytes_per_s = None
        self._wake.set()

    def cancel(self) -> None:
        """Make the save raise Cancelled at its next chunk."""
        self._is_cancelled = True
        self._wake.set()


def temporary_folder(checkpoints: Path, attempt: int, step: int) -> Path:
    """The folder in which the ranks write before the commit."""
    return checkpoints / f"{UNCOMMITTED_PREFIX}{attempt:04d}-{step:08d}"


def make_temporary_folder(folder: Path) -> None:
    """Make the folder of `temporary_folder`, and its parent if need be.

    Raises OSError when the run directory is gone, which is never made anew.
    """
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)


def write_rank_file(
    folder: Path,
    rank: int,
    tensors: Mapping[str, int],
    parts: Iterable[NDArray[np.float32]],
    chunk_bytes: int = CHUNK_BYTES,
    pace: Pace | None = None,
) -> FileEntry:
    """Write one rank's file durably; its entry for the index.

    `tensors` holds the number of elements of each flat fp32 tensor. `parts` is their concatenated content, in
    parts of any size.
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
    """The bytes of `parts` in chunks of `chunk_bytes`; only a chunk that spans several parts is copied."""
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
    """Verify a file that was just written, reading from the disk if the system allows. Raises Corrupt."""
    path = folder / entry.name
    with path.open("rb") as file:  # the page cache would prove nothing about the disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    advance = (pace or Pace()).advance
    for bad in verify_file(path, entry, tensors, chunk_bytes, advance, open_file=DirectReader):
        raise Corrupt(bad)


def commit(checkpoints: Path, temporary: Path, index: CheckpointIndex) -> Path:
    """Write the index into `temporary` and rename it into place; the committed folder.

    Raises OSError when a file that the index lists is missing or has another size, because another attempt
    has cleared the folder meanwhile.
    """
    for entry in index.files:
        size = (temporary / entry.name).stat().st_size
        if size != entry.size:
            raise OSError(f"{temporary / entry.name} has {size} bytes instead of {entry.size}")
    write_durably(temporary / INDEX_NAME, index.dumps())
    reach("index_written")
    final = checkpoints / step_name(index.step)
    if final.exists():  # corrupt: otherwise this attempt would have resumed from it
        reject(final)
    temporary.rename(final)
    reach("renamed")
    fsync_folder(checkpoints)
    reach("committed")
    return final


def discard(temporary: Path, rank: int) -> None:
    """Remove what `rank` wrote of a discarded save; the last rank to do so removes the folder."""
    with suppress(OSError):
        (temporary / rank_name(rank)).unlink(missing_ok=True)
        if rank == 0:
            for index in temporary.glob(f"*{INDEX_NAME}*"):
                index.unlink()
        temporary.rmdir()


def remove_leftovers(checkpoints: Path) -> None:
    """Delete the half-written and half-deleted folders that killed attempts left.

    Each is renamed first. A superseded attempt that is still alive then commits its whole save or, if it
    comes too late, nothing.
    """
    for entry in checkpoints.glob(f"{UNCOMMITTED_PREFIX}*"):
        with suppress(OSError):  # it was committed just now, or another process deletes it
            trash = entry.with_name(f"{UNCOMMITTED_PREFIX}trash-{time.time_ns()}")
            entry.rename(trash)
            shutil.rmtree(trash)
