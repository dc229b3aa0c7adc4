"""Heartbeats: workers report their progress to the node task, which detects hangs.

A heartbeat is one datagram to an abstract Unix socket. It leaves no file behind, never blocks, and does
nothing when nobody listens. launcher/node/hang_watchdog.py acts on silence. A worker also writes the stacks
of all its threads to its log on SIGQUIT, even while it waits in a collective; `wait_for_ranks` marks those
waits.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import ParamSpec, Self, TypeVar

from gpt.run.environment import WorkerEnvironment

WAITING = "waiting for the other ranks to start"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class HeartbeatMessage:
    """What one heartbeat says. The field names are the keys of the JSON datagram."""

    attempt: int  # 0 until the worker belongs to an attempt
    rank: int
    pid: int
    step: int  # completed steps
    doing: str
    starting: bool  # the start has a timeout of its own

    def encode(self) -> bytes:
        """The datagram."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, datagram: bytes) -> Self:
        """The message in `datagram`. Raises ValueError or TypeError when it is not one."""
        return cls(**json.loads(datagram))


class Heartbeat:
    """Sends the heartbeats of this worker. `attempt` is 0 until the worker belongs to one."""

    def __init__(self) -> None:
        name = WorkerEnvironment.read().heartbeat
        self._address = "\0" + name if name else None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.attempt = 0
        self._rank = int(os.environ.get("RANK", "0"))
        faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True)

    def beat(self, step: int, doing: str, *, is_starting: bool = False) -> None:
        """Report that `step` steps are done and that `doing` comes next."""
        if self._address is None:
            return
        message = HeartbeatMessage(self.attempt, self._rank, os.getpid(), step, doing, is_starting)
        with suppress(OSError):  # the queue is full or nobody listens: training goes on either way
            self._socket.sendto(message.encode(), self._address)


def wait_for_ranks(wait: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `wait`, which returns only once other ranks have done their part.

    The hang watchdog finds this function by its name in the stack of a worker and then knows that the worker
    waits for others. Every collective and every wait of ours goes through here.
    """
    return wait(*args, **kwargs)
