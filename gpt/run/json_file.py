"""Small JSON files on a shared file system: whole when read, and found although NFS caches names."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError

T = TypeVar("T")

RETRY_FOR_S = 300.0
RETRY_PAUSE_S = 5.0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a reader finds the old file or the new one, never a part."""
    write_durably(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when the file is missing. Raises ConfigError when it is garbled."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not an object")
    return content


def is_listed(path: Path) -> bool:
    """Whether `path` exists, for polling a file that another machine may create.

    NFS caches for a while that a name is missing, but it refreshes a folder each time the folder is opened.
    """
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208 - only names are needed
    except FileNotFoundError:
        return False


def retry_on_oserror(action: Callable[[], T]) -> T:
    """`action()`, retried for RETRY_FOR_S while it raises OSError: restarting would not mend the disk."""
    deadline = time.monotonic() + RETRY_FOR_S
    while True:
        try:
            return action()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            with suppress(OSError):
                print(f"the run directory does not answer, trying again: {error}", flush=True)
            time.sleep(RETRY_PAUSE_S)
