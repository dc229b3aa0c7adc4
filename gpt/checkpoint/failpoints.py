"""Numbered places along a save and a prune, where a test may kill the process, delay it or fail its disk.

`OUTLAST_FAILPOINTS` is a list, the first entry for the first generation of workers under an agent, the
second for the one after its first restart, and so on: `file_synced:kill@1,renamed:sleep=5,-`. Each is
`PLACE:ACTION[@RANK]`; an action is `kill` (SIGKILL), `kill=agent` (of the agent too, with which all its
workers die), `stop` (SIGSTOP), `sleep=SECONDS` or `error=ENOSPC` (any name of errno). Unset, nothing happens.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass
from functools import cache

from gpt.run.environment import Variable

# In the order in which a save reaches them.
PLACES = (
    "copied",
    "folder_made",
    "header_written",
    "chunk_written",
    "file_written",
    "file_synced",
    "read_back",
    "gathered",
    "record_synced",
    "index_written",
    "renamed",
    "committed",
    "prune_renamed",
    "pruned",
)


@dataclass(frozen=True)
class _Failpoint:
    place: str
    action: str
    value: str


def reach(place: str) -> None:
    """This process is at `place`: do what the environment asks for there. May raise OSError."""
    armed = _armed()
    if armed is None or armed.place != place:
        return
    match armed.action:
        case "kill":
            if armed.value == "agent":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(float(armed.value))
        case "error":
            number = getattr(errno, armed.value)
            raise OSError(number, os.strerror(number), place)


@cache
def _armed() -> _Failpoint | None:
    """What this process is asked to do; the one place that reads the environment."""
    entries = os.environ.get(Variable.FAILPOINTS, "").split(",")
    generation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if generation >= len(entries) or ":" not in entries[generation]:
        return None
    entry, _, rank = entries[generation].partition("@")
    if rank and rank != os.environ.get("RANK", "0"):
        return None
    place, _, action = entry.partition(":")
    action, _, value = action.partition("=")
    if place not in PLACES or action not in ("kill", "stop", "sleep", "error"):
        raise ValueError(f"{Variable.FAILPOINTS}: {entry!r} is none; places: {', '.join(PLACES)}")
    return _Failpoint(place, action, value)
