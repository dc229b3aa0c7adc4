"""Files and names that survive a crash: the one place that knows fsync's rules."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` so that a reader finds the old file or the new one whole, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
