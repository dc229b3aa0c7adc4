"""The loop of a sidecar: a process that runs next to the workers and handles what is new in a run.

It tries again after a failure, reports both, and ends when it is asked to and nothing is left to do. Training
never waits for it. Torch-free.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from gpt.run.stop import STOP_SIGNALS
from gpt.sidecars.health import HealthReport


def become_sidecar(*, is_last_pass: bool = False) -> threading.Event:
    """Set up the signals and the priority of this process; the event is set by SIGTERM.

    Stop requests are meant for the workers: a sidecar ignores them, because it still has to handle what the
    workers write before they end. With `is_last_pass` the workers have ended, and the event is set.
    """
    ended = threading.Event()
    if is_last_pass:
        ended.set()

    def on_end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, on_end)
    for number in {*STOP_SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    return ended


def follow(
    do_round: Callable[[bool], None],
    ended: threading.Event,
    report: HealthReport,
    *,
    poll_s: float,
    retry_s: float,
    patience_s: float,
) -> bool:
    """Call `do_round` every `poll_s`, with True once `ended` is set; whether that last round succeeded.

    `do_round` reports its success itself. After an error the round is repeated in `retry_s`; the last round
    is repeated for at most `patience_s`.
    """
    deadline = float("inf")
    while True:
        is_last = ended.is_set()
        if is_last:
            deadline = min(deadline, time.monotonic() + patience_s)
        try:
            do_round(is_last)
            if is_last:
                report.ended(is_complete=True)
                return True
            ended.wait(poll_s)
        except Exception as error:  # of any library: training continues
            report.failed(error)
            if is_last and time.monotonic() > deadline - retry_s:
                report.ended(is_complete=False)
                return False
            time.sleep(retry_s) if is_last else ended.wait(retry_s)
