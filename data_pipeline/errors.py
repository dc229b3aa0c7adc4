"""The errors that users see. Everything else that escapes is a bug.

Each says what is wrong, the values, and what to do next. gpt/run/exit_codes.py maps them to exit codes.
"""

from collections.abc import Sequence


class OutlastError(Exception):
    """Base of every error that is meant for a user's eyes."""


class ConfigError(OutlastError):
    """The user's input is wrong; `problems` lists everything that is, one sentence or two each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(OutlastError):
    """A source, a shard or a data set is not what it says it is."""


class CheckpointError(OutlastError):
    """No intact checkpoint where there must be one, or one that belongs to another model: do not restart."""


class LaunchError(OutlastError):
    """A run cannot be started, stopped or found as asked."""


class DataExhausted(DataError):
    """A batch past the last epoch that `data.max_epochs` allows."""
