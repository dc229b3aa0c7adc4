"""Writing a checkpoint: each rank its file, rank 0 the index, a rename as the commit.

The order is write, fsync, read back, index, fsync, rename, fsync of the folder; a kill at any point
leaves either the whole checkpoint or a `.tmp-` folder that the next start removes.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import fsync_folder, write_durably
from gpt.checkpoint.format import (
    CHUNK_BYTES,
    INDEX_NAME,
    CheckpointIndex,
    FileEntry,
    chunk_checksum,
    committed,
    frame_checksum,
    rank_header,
    rank_name,
    step_name,
)

_TEMPORARY = ".tmp-"


def temporary_folder(checkpoints: Path, attempt: int, step: int) -> Path:
    """Where the ranks write before the commit."""
    return checkpoints / f"{_TEMPORARY}{attempt:04d}-{step:08d}"


def write_rank_file(
    folder: Path,
    rank: int,
    tensors: Mapping[str, Sequence[NDArray[np.float32]]],
    chunk_bytes: int = CHUNK_BYTES,
) -> FileEntry:
    """Write the flat fp32 tensors of one rank durably, each in parts; what the index says of it."""
    sizes = {name: sum(part.size for part in parts) for name, parts in tensors.items()}
    header, _, _ = rank_header(sizes, chunk_bytes)
    path = folder / rank_name(rank)
    checksums: list[int] = []
    pending = bytearray()
    with path.open("wb") as file:
        file.write(header)
        for array in chain.from_iterable(tensors.values()):
            view = np.ascontiguousarray(array, dtype="<f4").data.cast("B")
            while len(view):
                if not pending and len(view) >= chunk_bytes:
                    chunk, view = view[:chunk_bytes], view[chunk_bytes:]
                    checksums.append(chunk_checksum(chunk))
                    file.write(chunk)
                    continue
                room = chunk_bytes - len(pending)
                pending += view[:room]
                view = view[room:]
                if len(pending) == chunk_bytes:
                    checksums.append(chunk_checksum(bytes(pending)))
                    file.write(pending)
                    pending.clear()
        if pending:
            checksums.append(chunk_checksum(bytes(pending)))
            file.write(pending)
        table = np.array(checksums, dtype="<u8").tobytes()
        file.write(table)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(name=path.name, size=size, checksum=frame_checksum(header, table))


def commit(checkpoints: Path, temporary: Path, index: CheckpointIndex) -> Path:
    """Write the index into `temporary` and rename it into place; the committed folder."""
    write_durably(temporary / INDEX_NAME, index.dumps())
    final = checkpoints / step_name(index.step)
    if final.exists():  # it did not verify when this attempt started, or it would have been resumed from
        set_aside(final)
    temporary.rename(final)
    fsync_folder(checkpoints)
    return final


def set_aside(folder: Path) -> Path:
    """Take a bad checkpoint out of the line without deleting it."""
    aside = folder.with_name(f".bad-{folder.name}-{time.time_ns()}")
    folder.rename(aside)
    return aside


def prune(checkpoints: Path, keep_last: int) -> list[int]:
    """Delete all but the newest `keep_last` committed checkpoints; the steps that went."""
    doomed = committed(checkpoints)[:-keep_last]
    for _, folder in doomed:
        # Renamed first: a kill in the middle of the deletion must not leave half a committed folder.
        trash = folder.with_name(f"{_TEMPORARY}pruned-{folder.name}")
        folder.rename(trash)
        shutil.rmtree(trash)
    return [step for step, _ in doomed]


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed attempts left half-written or half-deleted."""
    for entry in checkpoints.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(entry, ignore_errors=True)
