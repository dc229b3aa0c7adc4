"""Signs of life: a worker tells its node task how far it is, so that a hang is found and its culprit named.

A datagram to an abstract Unix socket a step: no file is left behind, nothing waits, and without a listener
nothing happens. launcher/node/hang_watchdog.py acts on silence; here a worker only makes its stacks readable:
SIGQUIT writes those of all threads to its log, also while it waits in a collective.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
from contextlib import suppress

from gpt.run.environment import WorkerEnvironment

WAITING = "waiting for the other ranks to start"


class Heartbeat:
    """This worker's line to its node task. `attempt` is 0 until the worker belongs to one."""

    def __init__(self) -> None:
        name = WorkerEnvironment.read().heartbeat
        self._address = "\0" + name if name else None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.attempt = 0
        self._rank = int(os.environ.get("RANK", "0"))
        faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True)

    def beat(self, step: int, doing: str, *, is_starting: bool = False) -> None:
        """Alive: `step` steps are done, and now comes `doing`. `is_starting` asks for more patience."""
        if self._address is None:
            return
        sign = {
            "attempt": self.attempt,
            "rank": self._rank,
            "pid": os.getpid(),
            "step": step,
            "doing": doing,
            "starting": is_starting,
        }
        with suppress(OSError):  # a full queue, or nobody there: never a matter for training
            self._socket.sendto(json.dumps(sign).encode(), self._address)
