"""A process beside the workers that follows a run: it does what is new, tries again after a failure, and ends
once it is asked to and nothing is left. No step ever waits for it. Torch-free.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType


def until_asked_to_end() -> threading.Event:
    """Make this process one that follows; the event is set by SIGTERM.

    Stop requests are for the workers: what these leave behind is still to be dealt with.
    """
    ended = threading.Event()

    def on_end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, on_end)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    return ended


def follow(
    do_round: Callable[[bool], None],
    ended: threading.Event,
    *,
    failed: Callable[[Exception], None],
    poll_s: float,
    retry_s: float,
    patience_s: float,
) -> bool:
    """Call `do_round` every `poll_s`, with True once `ended` is set; whether that went well.

    After an error, which `failed` hears, it is called again in `retry_s`; the last time for `patience_s`.
    """
    deadline = float("inf")
    while True:
        is_last = ended.is_set()
        if is_last:
            deadline = min(deadline, time.monotonic() + patience_s)
        try:
            do_round(is_last)
            if is_last:
                return True
            ended.wait(poll_s)
        except Exception as error:  # of whatever library: training goes on
            failed(error)
            if is_last and time.monotonic() > deadline - retry_s:
                return False
            time.sleep(retry_s) if is_last else ended.wait(retry_s)
