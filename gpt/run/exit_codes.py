"""Exit codes: what a command or a worker reports, and what starts again because of it.

torchrun restarts its workers on every code except 0, and its own exit code is unreliable. Workers that end on
purpose therefore exit with 0 after rank 0 has written the code into the attempt's result.json.
"""

from enum import IntEnum

from data_pipeline.errors import CheckpointError, ConfigError, DataError, Diverged, LaunchError, OutlastError


class ExitCode(IntEnum):
    """The exit code of a command, and of an attempt in its result.json."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 75
    DO_NOT_RESTART = 93

    @property
    def meaning(self) -> str:
        """What the code says, as `--help` and the README print it."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.FINISHED: "done",
    ExitCode.FAILED: "any other failure",
    ExitCode.BAD_INPUT: "the input is wrong",
    ExitCode.STOPPED: "stopped with everything saved, start again to continue",
    ExitCode.DO_NOT_RESTART: "do not restart",
}

# The first row that matches decides, so a subclass comes before its base.
_CODES: tuple[tuple[type[OutlastError], ExitCode], ...] = (
    (CheckpointError, ExitCode.DO_NOT_RESTART),
    (Diverged, ExitCode.DO_NOT_RESTART),
    (ConfigError, ExitCode.BAD_INPUT),
    (DataError, ExitCode.BAD_INPUT),
    (LaunchError, ExitCode.BAD_INPUT),
    (OutlastError, ExitCode.FAILED),
)


def exit_code_of(error: OutlastError) -> ExitCode:
    """The exit code that reports `error`."""
    return next(code for kind, code in _CODES if isinstance(error, kind))
