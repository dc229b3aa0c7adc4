"""The errors that users see. Any other exception that reaches a user is a bug.

Each message says what is wrong, gives the values, and says what to do next. gpt/run/exit_codes.py maps each
class to the exit code of the command that failed.
"""

from collections.abc import Sequence


class OutlastError(Exception):
    """Base class of every error that is written for users."""


class ConfigError(OutlastError):
    """The user's input is wrong. `problems` lists everything wrong with it, in one or two sentences each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(OutlastError):
    """A source, a shard or a data set is damaged, missing, or not what its description says."""


class CheckpointError(OutlastError):
    """No intact checkpoint exists where one is required, or it belongs to another model: do not restart."""


class Diverged(OutlastError):
    """The training no longer learns, and would not after a restart either."""


class LaunchError(OutlastError):
    """A run cannot be found, started or stopped."""


class DataExhausted(DataError):
    """A step needs more data than `data.max_epochs` allows."""
