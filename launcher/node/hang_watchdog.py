"""Finds the workers of this node that make no progress any more, and names the rank that holds up the others.

Every worker reports how far it is (gpt/run/heartbeat.py). When one is silent for too long, each node task
records what its workers were doing: the step, the state of the process, and where in the program it is. The
position comes from stacks that the worker writes to its log. The first node reads all reports and names the
culprit. The node task then ends the workers, so that torchrun restarts them.
"""

import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt.run.heartbeat import WAITING
from gpt.run.json_file import is_listed, read_json, write_json
from gpt.run.run_dir import AttemptDir
from launcher.process_tree import process_state

# A rank that waits for one which does not come: the node of that one has it first.
_WAITING_PATIENCE_S = 60.0
_STACKS_S = 1.0
_GATHER_S = 8.0
_TAIL_BYTES = 1 << 17
_UCRED = struct.Struct("3i")  # process, user, group: unix(7)
# Where a rank that waits for the others is, seen from its innermost frame of Python.
_IN_COLLECTIVE = re.compile(r'File ".*(torch/distributed/|deepspeed/comm/|gpt/distributed\.py)')


@dataclass(frozen=True)
class Sign:
    """The last sign of life of one worker; `attempt` is 0 until it belongs to one."""

    attempt: int
    rank: int
    pid: int
    step: int
    doing: str
    starting: bool


@dataclass(frozen=True)
class Suspect:
    """One worker in a hang: how far it came, its state in /proc, the innermost frames of its main thread."""

    rank: int
    host: str
    step: int
    doing: str
    state: str
    where: str
    is_waiting: bool


class Watch:
    """Listens to the workers of one node."""

    def __init__(self, timeout_s: float, start_timeout_s: float) -> None:
        self._timeout_s, self._start_timeout_s = timeout_s, max(timeout_s, start_timeout_s)
        self.name = f"outlast-{os.getpid()}-{time.monotonic_ns()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # anybody here may write to it
        self._socket.bind("\0" + self.name)
        self._heard: dict[int, tuple[float, Sign]] = {}

    def silent(self, workers: Iterable[int]) -> bool:
        """Whether one of the processes `workers` has been silent for too long."""
        with suppress(BlockingIOError):
            while True:
                message, credentials, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_UCRED.size))
                if _user(credentials) != os.getuid():
                    continue
                with suppress(ValueError, TypeError):
                    sign = Sign(**json.loads(message))
                    self._heard[sign.pid] = (time.monotonic(), sign)
        alive = set(workers)
        self._heard = {pid: heard for pid, heard in self._heard.items() if pid in alive}
        return any(time.monotonic() - at > self._patience_s(sign) for at, sign in self._heard.values())

    def _patience_s(self, sign: Sign) -> float:
        """Reading a checkpoint and compiling may take long; steps may not."""
        if not sign.starting:
            return self._timeout_s
        return self._start_timeout_s + (_WAITING_PATIENCE_S if sign.doing == WAITING else 0.0)

    @property
    def attempt(self) -> int:
        """The attempt that the workers make, 0 before they have claimed one."""
        return max((sign.attempt for _, sign in self._heard.values()), default=0)

    @property
    def silence_s(self) -> float:
        """How long the worker heard last has been silent."""
        return time.monotonic() - max(at for at, _ in self._heard.values())

    def forget(self) -> None:
        """These workers are dealt with."""
        self._heard.clear()

    def suspects(self, host: str, node: int, attempt: AttemptDir) -> list[Suspect]:
        """What each worker of this node is doing; workers that still run write their stacks to their logs."""
        marks = {}
        for pid, (_, sign) in self._heard.items():
            log = attempt.rank_log(node, sign.rank)
            marks[pid] = log.stat().st_size if log.exists() else 0
            if process_state(pid) not in ("T", "t"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
        time.sleep(_STACKS_S)
        found = []
        for pid, (_, sign) in self._heard.items():
            frames = _main_thread(attempt.rank_log(node, sign.rank), marks[pid])
            found.append(
                Suspect(
                    sign.rank,
                    host,
                    sign.step,
                    sign.doing,
                    process_state(pid) or "gone",
                    "; ".join(frames[:3]),
                    sign.doing == WAITING or (bool(frames) and _IN_COLLECTIVE.search(frames[0]) is not None),
                )
            )
        return sorted(found, key=lambda suspect: suspect.rank)


def _user(credentials: Sequence[tuple[int, int, bytes]]) -> int | None:
    """Who has sent a message, as the kernel says."""
    for level, kind, data in credentials:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            user: int = _UCRED.unpack(data[: _UCRED.size])[1]
            return user
    return None


def report(attempt: AttemptDir, node: int, suspects: Sequence[Suspect]) -> None:
    """Put this node's part where the first node finds it."""
    write_json(attempt.hang_report(node), {"workers": [asdict(suspect) for suspect in suspects]})


def gather(attempt: AttemptDir, nodes: int) -> tuple[list[Suspect], list[int]]:
    """All nodes' suspects, and the nodes that said nothing in time."""
    deadline = time.monotonic() + _GATHER_S
    while True:
        paths = {node: attempt.hang_report(node) for node in range(nodes)}
        parts = {node: read_json(path) if is_listed(path) else None for node, path in paths.items()}
        silent = [node for node, part in parts.items() if part is None]
        if not silent or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    found = [Suspect(**row) for part in parts.values() if part is not None for row in part["workers"]]
    return sorted(found, key=lambda suspect: suspect.rank), silent


def culprits(suspects: Sequence[Suspect], silent_nodes: Sequence[int]) -> str:
    """Who holds up the others, in words."""
    if silent_nodes:
        return f"node {', '.join(map(str, silent_nodes))} says nothing: its task does not run, or is cut off"
    stopped = [suspect for suspect in suspects if suspect.state in ("T", "t")]
    if stopped:
        return _names(stopped) + " is stopped (state T in /proc)"
    busy = [suspect for suspect in suspects if not suspect.is_waiting]
    is_apart = 0 < len(busy) < len(suspects)
    # Signs of fast steps may be lost, where the listener's queue is full: stacks are surer than counts.
    if is_apart and all(suspect.where for suspect in suspects):
        return _holds_up(busy)
    behind = min(suspect.step for suspect in suspects)
    late = [suspect for suspect in suspects if suspect.step == behind]
    if len(late) < len(suspects):
        return f"{_names(late)} has done {behind} steps, the others more; {late[0].doing}: {late[0].where}"
    if is_apart:
        return _holds_up(busy)
    return f"no rank stands out after step {behind}; the stacks are in the ranks' logs"


def _holds_up(busy: Sequence[Suspect]) -> str:
    where = busy[0].where or f"state {busy[0].state} in /proc"
    return f"{_names(busy)} does not wait for the others, they do for it; {busy[0].doing}: {where}"


def _names(suspects: Sequence[Suspect]) -> str:
    return ", ".join(f"rank {suspect.rank} on {suspect.host}" for suspect in suspects)


def _main_thread(log: Path, start: int) -> list[str]:
    """The frames of the main thread in what faulthandler wrote behind byte `start`, innermost first."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            text = file.read(_TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    stacks = re.split(r"^(?:Current thread|Thread) 0x.*$", text, flags=re.MULTILINE)
    if len(stacks) < 2:
        return []
    # faulthandler writes the main thread last.
    return [line.strip() for line in stacks[-1].splitlines() if line.strip().startswith("File ")]
