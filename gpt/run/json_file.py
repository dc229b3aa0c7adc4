"""Small JSON files on a shared file system: whole when read, and found although NFS caches names."""

import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError

T = TypeVar("T")

RETRY_FOR_S = 300.0
RETRY_PAUSE_S = 5.0

_DECODER = json.JSONDecoder(parse_constant=lambda _name: None)  # json.loads would make one for each line


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a reader finds the old file or the new one, never a part."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A name that is not UTF-8 has surrogates in Python; as escapes they are valid in JSON.
    write_durably(path, text.encode(errors="backslashreplace"))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises ConfigError when it is a FIFO, which would block, or no file at all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file. Move it away.")
    return os.fdopen(descriptor, "rb")


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text. NaN and the infinities, which JSON does not have, become null.

    Raises ValueError when `raw` is not JSON, also when it is nested too deeply to be read.
    """
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when the file is missing. Raises ConfigError when it is garbled."""
    try:
        with open_regular(path) as file:
            content = parse_json(file.read())
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
