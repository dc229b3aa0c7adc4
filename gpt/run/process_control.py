"""prctl(2): who ends with whom. The only place that calls it. Linux only."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(signal_number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process `signal_number` when its parent ends: it is never orphaned.

    `parent` is the parent's process id, where it is known. Without it, a parent that ended before this call
    goes unnoticed: the kernel watches whoever is the parent now.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), signal_number)


def dies_with_parent(signal_number: int) -> Callable[[], None]:
    """A `preexec_fn`: the child receives `signal_number` when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a forked child may hardly allocate memory
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call
            os.kill(os.getpid(), signal_number)

    return prepare


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that none can leave its process tree."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
