"""The errors that users see. Any other exception that reaches a user is a bug.

Each message says what is wrong, gives the values, and says what to do next. `exit_code` is the exit code of
the command that failed.
"""

from collections.abc import Sequence


class OutlastError(Exception):
    """Base class of every error that is written for users."""

    exit_code = 1


class ConfigError(OutlastError):
    """The user's input is wrong. `problems` lists everything wrong with it, in one or two sentences each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(OutlastError):
    """A source, a shard or a data set is damaged, missing, or not what its description says."""

    exit_code = 2


class CheckpointError(OutlastError):
    """No intact checkpoint exists where one is required, or it belongs to another model: do not restart."""

    exit_code = 93


class LaunchError(OutlastError):
    """A run cannot be found, started or stopped."""

    exit_code = 2


class DataExhausted(DataError):
    """A step needs more data than `data.max_epochs` allows."""
