"""Named places along a save and a prune at which a test can kill or delay the process or fail its disk.

`OUTLAST_FAILPOINTS` is a list such as `file_synced:kill@1,renamed:sleep=5,-`. The first entry is for the
first generation of workers, the second for the one after the first restart, and so on. An entry is
`PLACE:ACTION[@RANK]`. The action is `kill` (SIGKILL), `kill=agent` (kills the agent too, and with it all of
its workers), `stop` (SIGSTOP), `sleep=SECONDS` or `error=ENOSPC` (any name of errno). Nothing happens when
the variable is unset.
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
    """Do what the environment asks for at `place`. May raise OSError."""
    armed = armed_failpoint()
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
def armed_failpoint() -> _Failpoint | None:
    """The failpoint that the environment sets for this process."""
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
        raise ValueError(f"{Variable.FAILPOINTS}: {entry!r} is not a failpoint; places: {', '.join(PLACES)}")
    return _Failpoint(place, action, value)
