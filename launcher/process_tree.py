"""Which processes are alive on this host, and how a whole tree of them is ended.

A process id alone does not identify a process: ids are reused, especially after a reboot. Linux only. Only
descendants of the caller are ever signalled.
"""

import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path


def identity(pid: int) -> str | None:
    """What distinguishes process `pid` from a later one with the same id; None if it is dead or a zombie."""
    fields = _stat(pid)
    if fields is None or fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{fields[19]}"  # field 22 of proc(5): start time in ticks since boot


def process_state(pid: int) -> str | None:
    """The state letter of proc(5): R, S, D, T (stopped), Z…; None if there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields is not None else None


def workers(root: int) -> list[int]:
    """The training processes below `root`, at whatever depth torchrun is; not their own children."""
    families = _families()
    found: list[int] = []
    unseen = [root]
    while unseen:
        for child in families.get(unseen.pop(), ()):
            (found if _has_variable(child, b"LOCAL_RANK") else unseen).append(child)
    return found


def descendants(root: int, spare: Collection[int] = ()) -> list[int]:
    """The living processes below `root`, without `root` itself and without the trees of `spare`."""
    return list(_below(_families(), root, spare))


def kill_descendants(spare: Collection[int] = (), timeout_s: float = 10.0) -> None:
    """End everything below this process with SIGKILL, except the trees of `spare`, and wait until it is gone.

    A process in uninterruptible sleep does not die until it wakes up, so the wait ends after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        left = descendants(os.getpid(), spare)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _families() -> dict[int, list[int]]:
    """Parent → living children, for all processes of this host."""
    families: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields is not None and fields[0] not in "ZX":
                families.setdefault(int(fields[1]), []).append(int(entry.name))
    return families


def _below(families: dict[int, list[int]], root: int, spare: Collection[int]) -> Iterator[int]:
    for child in families.get(root, ()):
        if child not in spare:
            yield child
            yield from _below(families, child, spare)


def _has_variable(pid: int, name: bytes) -> bool:
    """Whether process `pid` was started with the environment variable `name`."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or now belongs to another user
        return False
    return any(variable.startswith(name + b"=") for variable in variables)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (the second one, the name, may contain anything)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
