"""Writes and renames that survive a power loss: the rules of fsync.

Three steps make a new file durable, in this order: fsync the file, rename it to its final name, fsync the
parent folder. Without the first step the name may point to an empty file after a crash, without the last one
the name itself may be lost. Readers never see a half-written file, because the rename is atomic.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataError


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path`; after a crash a reader finds either the old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            fsync_file(file)
        temporary.replace(path)
    except OSError:  # the disk is full, for example: leave nothing behind
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def require_writable(folder: Path) -> None:
    """Raises DataError if no file can be created in `folder`."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{folder}: no file can be created there: {error.strerror}") from None


def rename_durably(source: Path, target: Path) -> None:
    """Rename `source`, whose content is already durable, to `target`, so that the new name is durable too."""
    source.rename(target)
    fsync_folder(target.parent)


def fsync_file(file: IO[Any]) -> None:
    """Flush the open `file` and wait until its content is on disk."""
    file.flush()
    fsync_descriptor(file.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until the names in the folder `path` are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def fsync_descriptor(descriptor: int) -> None:
    """Wait until what was written through the open `descriptor` is on disk."""
    os.fsync(descriptor)
