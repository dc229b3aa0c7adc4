"""Detects workers of this node that make no progress, and names the rank that the others wait for.

Every worker sends heartbeats (gpt/run/heartbeat.py). When a worker is silent for too long, each node task
records what its workers are doing: the step, the state of the process, and the position in the program, which
it reads from the stacks that the workers write to their logs. The first node collects the reports of all
nodes and names the culprit. The node task then kills the workers, so that torchrun restarts them.
"""

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

from gpt.run.heartbeat import WAITING, HeartbeatMessage, wait_for_ranks
from gpt.run.json_file import is_listed, read_json, write_json
from gpt.run.run_dir import AttemptDir
from launcher.process_tree import process_state

# Extra time for a rank that waits for the others to start, so that the node of the late rank reports first.
_WAITING_PATIENCE_S = 60.0
# The watchdog looks every second. After a longer gap the job was suspended, or its machine was.
_GAP_S = 5.0
_STACKS_S = 1.0
_COLLECT_S = 8.0
_TAIL_BYTES = 1 << 17
_UCRED = struct.Struct("3i")  # process, user, group: unix(7)
# A frame of faulthandler's is `File "PATH", line N in FUNCTION`. A collective of torch or DeepSpeed is the
# innermost frame of Python; below `wait_for_ranks`, every frame belongs to a wait for other ranks.
_COLLECTIVE_FRAME = re.compile(r'File ".*(torch/distributed/|deepspeed/comm/)')
_WAIT_FRAME_END = f" in {wait_for_ranks.__name__}"


@dataclass(frozen=True)
class Suspect:
    """One worker in a hang: its step, its state in /proc, and the innermost frames of its main thread."""

    rank: int
    host: str
    step: int
    doing: str
    state: str
    where: str
    is_waiting: bool


class HangWatchdog:
    """Receives the heartbeats of the workers of one node."""

    def __init__(self, timeout_s: float, start_timeout_s: float) -> None:
        self._timeout_s, self._start_timeout_s = timeout_s, max(timeout_s, start_timeout_s)
        self.name = f"outlast-{os.getpid()}-{time.monotonic_ns()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # any user here may write to it
        self._socket.bind("\0" + self.name)
        self._last: dict[int, tuple[float, HeartbeatMessage]] = {}  # process id → when, and what
        self._looked = self._seen_workers = time.monotonic()
        self.has_seen_workers = False
        self.newest_attempt = 0

    def is_any_silent(self, workers: Iterable[int]) -> bool:
        """Whether one of the processes `workers` has sent heartbeats and then been silent for too long.

        Silence counts only while this process runs: `scontrol suspend` and SIGSTOP stop the workers with it.
        """
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if gap > _GAP_S:
            self._last = {pid: (now, message) for pid, (_, message) in self._last.items()}
            self._seen_workers = now
        with suppress(BlockingIOError):
            while True:
                datagram, credentials, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_UCRED.size))
                if _user(credentials) != os.getuid():
                    continue
                with suppress(ValueError, TypeError):
                    message = HeartbeatMessage.decode(datagram)
                    self._last[message.pid] = (time.monotonic(), message)
                    self.newest_attempt = max(self.newest_attempt, message.attempt)
        alive = set(workers)
        self._last = {pid: last for pid, last in self._last.items() if pid in alive}
        return any(time.monotonic() - at > self._patience_s(message) for at, message in self._last.values())

    def seconds_without(self, workers: Iterable[int]) -> float:
        """For how long there have been no `workers`; 0 while there are some."""
        if any(True for _ in workers):
            self.has_seen_workers, self._seen_workers = True, self._looked
        return self._looked - self._seen_workers

    def _patience_s(self, message: HeartbeatMessage) -> float:
        """Reading a checkpoint and compiling may take longer than a step."""
        if not message.starting:
            return self._timeout_s
        return self._start_timeout_s + (_WAITING_PATIENCE_S if message.doing == WAITING else 0.0)

    @property
    def attempt(self) -> int:
        """The attempt of the workers, 0 before they have claimed one."""
        return max((message.attempt for _, message in self._last.values()), default=0)

    @property
    def silence_s(self) -> float:
        """The seconds since the last heartbeat of any worker."""
        return time.monotonic() - max(at for at, _ in self._last.values())

    def forget(self) -> None:
        """Forget the current workers, which have been killed."""
        self._last.clear()
        self._looked = time.monotonic()  # finding the culprit takes longer than _GAP_S

    def suspects(self, host: str, node: int, attempt: AttemptDir) -> list[Suspect]:
        """What each worker of this node is doing; workers that can run write their stacks to their logs."""
        log_sizes = {}
        for pid, (_, message) in self._last.items():
            log = attempt.rank_log(node, message.rank)
            log_sizes[pid] = log.stat().st_size if log.exists() else 0
            if process_state(pid) not in ("T", "t"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
        time.sleep(_STACKS_S)
        found = []
        for pid, (_, message) in self._last.items():
            frames = main_thread_frames(attempt.rank_log(node, message.rank), log_sizes[pid])
            found.append(
                Suspect(
                    message.rank,
                    host,
                    message.step,
                    message.doing,
                    process_state(pid) or "gone",
                    "; ".join(frames[:3]),
                    message.doing == WAITING or is_waiting_for_ranks(frames),
                )
            )
        return sorted(found, key=lambda suspect: suspect.rank)


def is_waiting_for_ranks(frames: Sequence[str]) -> bool:
    """Whether a thread with these `frames`, innermost first, waits for other ranks."""
    is_in_collective = bool(frames) and _COLLECTIVE_FRAME.search(frames[0]) is not None
    return is_in_collective or any(frame.endswith(_WAIT_FRAME_END) for frame in frames)


def _user(credentials: Sequence[tuple[int, int, bytes]]) -> int | None:
    """The user id of the sender of a datagram, as the kernel reports it."""
    for level, kind, data in credentials:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            user: int = _UCRED.unpack(data[: _UCRED.size])[1]
            return user
    return None


def write_report(attempt: AttemptDir, node: int, suspects: Sequence[Suspect]) -> None:
    """Write this node's report for the first node."""
    write_json(attempt.hang_report(node), {"workers": [asdict(suspect) for suspect in suspects]})


def collect_reports(attempt: AttemptDir, nodes: int) -> tuple[list[Suspect], list[int]]:
    """The suspects of all nodes, and the nodes that did not report in time."""
    deadline = time.monotonic() + _COLLECT_S
    while True:
        paths = {node: attempt.hang_report(node) for node in range(nodes)}
        reports = {node: read_json(path) if is_listed(path) else None for node, path in paths.items()}
        missing = [node for node, report in reports.items() if report is None]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    found = [Suspect(**row) for report in reports.values() if report is not None for row in report["workers"]]
    return sorted(found, key=lambda suspect: suspect.rank), missing


def name_culprits(suspects: Sequence[Suspect], silent_nodes: Sequence[int]) -> str:
    """A sentence about the ranks or nodes that the others wait for."""
    if silent_nodes:
        nodes = ", ".join(map(str, silent_nodes))
        return f"node {nodes} does not report: its task is not running, or the node is unreachable"
    stopped = [suspect for suspect in suspects if suspect.state in ("T", "t")]
    if stopped:
        return _names(stopped) + " is stopped (state T in /proc)"
    busy = [suspect for suspect in suspects if not suspect.is_waiting]
    is_apart = 0 < len(busy) < len(suspects)
    # Heartbeats of fast steps are lost when the watchdog's queue is full, so stacks come before step counts.
    if is_apart and all(suspect.where for suspect in suspects):
        return _not_waiting(busy)
    slowest = min(suspect.step for suspect in suspects)
    late = [suspect for suspect in suspects if suspect.step == slowest]
    if len(late) < len(suspects):
        return f"{_names(late)} has done {slowest} steps, the others more; {late[0].doing}: {late[0].where}"
    if is_apart:
        return _not_waiting(busy)
    return f"no rank differs from the others after step {slowest}; the stacks are in the ranks' logs"


def _not_waiting(busy: Sequence[Suspect]) -> str:
    where = busy[0].where or f"state {busy[0].state} in /proc"
    return f"the other ranks wait for {_names(busy)}, which is not waiting; {busy[0].doing}: {where}"


def _names(suspects: Sequence[Suspect]) -> str:
    return ", ".join(f"rank {suspect.rank} on {suspect.host}" for suspect in suspects)


def main_thread_frames(log: Path, start: int) -> list[str]:
    """The frames of the main thread, innermost first, in what faulthandler wrote after byte `start`."""
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
