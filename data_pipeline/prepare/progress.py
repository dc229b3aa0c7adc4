"""The progress of a preparation: what the workers report, summed up for the user."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


class Advance(NamedTuple):
    """What a worker has done since its last report, and an optional message for the user."""

    bytes: int
    documents: int
    tokens: int
    message: str | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a preparation. `message` is a message that the user should see once."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    message: str | None = None


class ProgressReporter:
    """Sums up the workers' reports and calls `report` with the result; repeats no message."""

    def __init__(self, report: Callable[[Progress], None] | None, bytes_total: int) -> None:
        self._report = report or (lambda _: None)
        self._progress = Progress(0, bytes_total, 0, 0)
        self._messages: set[str] = set()

    def advance(self, by: Advance) -> None:
        """Add a worker's report."""
        before = self._progress
        self._progress = replace(
            before,
            bytes_done=before.bytes_done + by.bytes,
            documents=before.documents + by.documents,
            tokens=before.tokens + by.tokens,
        )
        self._report(self._progress)
        if by.message is not None:
            self.message(by.message)

    def message(self, text: str) -> None:
        """Report a message unless it was reported before: several workers may send the same one."""
        if text not in self._messages:
            self._messages.add(text)
            self._report(replace(self._progress, message=text))
