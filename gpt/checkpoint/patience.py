"""Reads that a file system refuses for a moment are tried again: an I/O error says nothing about the bytes.

A network file system answers EIO or ESTALE while its server restarts or a mount recovers. Whoever took that
for a corrupt checkpoint would set an intact one aside.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import CheckpointError

T = TypeVar("T")

RETRY_FOR_S = 60.0
_LONGEST_PAUSE_S = 5.0


class Unreadable(CheckpointError):
    """A file of a checkpoint that the system does not read at the moment; its bytes may well be intact."""


def is_about_content(error: OSError) -> bool:
    """Whether `error` says that the file is not there, rather than that it cannot be read now."""
    return isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))


def patiently(path: Path, read: Callable[[], T]) -> T:
    """`read()`, which reads `path`, tried again for RETRY_FOR_S while it raises OSError. Raises Unreadable.

    Each try must open the file anew. An OSError that `is_about_content` is raised at once.
    """
    deadline = time.monotonic() + RETRY_FOR_S
    pause_s = 0.1
    while True:
        try:
            return read()
        except OSError as error:
            if is_about_content(error):
                raise
            if isinstance(error, PermissionError) or time.monotonic() + pause_s > deadline:
                raise Unreadable(
                    f"{path} cannot be read: {error.strerror or error}. That says nothing about its content, "
                    "so the checkpoint stays as it is. Try again once the file system answers, or take an "
                    "older step (--step)."
                ) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
