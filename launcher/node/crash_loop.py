"""Counts workers that crash before they belong to an attempt, and finds out why they do.

torchrun restarts such workers in silence, up to launch.max_restarts times, and nobody else counts them: the
workers themselves count attempts (gpt/run/attempts.py), and these never made one.
"""

import re
from pathlib import Path

from gpt.run.events import Event, record_event
from launcher.node.job_run import JobRun
from launcher.node.torchrun import newest_generation

_TAIL_BYTES = 1 << 17
_TORCHRUN = r"torch\.distributed\.elastic\."
# The last line of a traceback: the exception's class and its message.
_ERROR = re.compile(rf"^(?!{_TORCHRUN})(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Corrupt)(?::.*)?$")
_EXIT_CODE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


class CrashLoop:
    """The generations of workers that one node's torchrun has started in this job run."""

    def __init__(self, job_run: JobRun, logs: Path, output: Path) -> None:
        """`logs` is torchrun's own folder, `output` the file with what it and its workers print."""
        self._job_run, self._logs, self._output = job_run, logs, output
        self._generation = 0
        self._claimed: int | None = None
        self._in_a_row = 0
        self._read_from = _size(output)
        self.cause = ""

    def count(self) -> int:
        """How many generations in a row, up to now, ended without an attempt; new ones are recorded."""
        generation = newest_generation(self._logs)
        ended = generation - self._generation
        if ended <= 0:
            return self._in_a_row
        self._generation = generation
        start, self._read_from = self._read_from, _size(self._output)
        claimed = self._job_run.own_attempt()
        if claimed != self._claimed:
            self._claimed, self._in_a_row = claimed, 0
            return 0
        self._in_a_row += ended
        # What a generation printed before it was noticed here counts for the one before it.
        self.cause = last_error(self._output, start) or self.cause or f"see {self._output.name}"
        record_event(
            self._job_run.run.events,
            Event.WORKERS_CRASHED,
            times=self._in_a_row,
            node=self._job_run.identity.name,
            cause=self.cause,
        )
        return self._in_a_row

    def newest_error(self) -> str | None:
        """What the newest generation printed last about an error; None if that was nothing."""
        return last_error(self._output, self._read_from)


def last_error(output: Path, start: int = 0) -> str | None:
    """The last exception of a worker in what was printed to `output` after byte `start`.

    Where no worker printed one, the exit code that torchrun reports; None if there is neither.
    """
    try:
        with output.open("rb") as file:
            file.seek(max(start, _size(output) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    lines = text.rpartition("\n")[0].splitlines()  # the last line may be half-written
    errors = (line for line in reversed(lines) if _ERROR.match(line))
    if (error := next(errors, None)) is not None:
        return error[:500]
    codes = (found for line in reversed(lines) if (found := _EXIT_CODE.search(line)))
    if (code := next(codes, None)) is not None:
        return f"the worker of local rank {code[2]} ended with exit code {code[1]}"
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
