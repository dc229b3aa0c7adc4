"""How far a preparation is: what workers report, added up for the user."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple


class Advance(NamedTuple):
    """What a worker has done since it last said so, and something to tell the user."""

    bytes: int
    documents: int
    tokens: int
    message: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a preparation is; `message` is something that a user should read once."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    message: str | None = None


class Tally:
    """Adds up what the workers say and passes it on."""

    def __init__(self, progress: Callable[[Progress], None] | None, bytes_total: int) -> None:
        self._progress = progress or (lambda _: None)
        self._state = Progress(0, bytes_total, 0, 0)
        self._told: set[str] = set()

    def advance(self, by: Advance) -> None:
        now = self._state
        self._state = replace(
            now,
            bytes_done=now.bytes_done + by.bytes,
            documents=now.documents + by.documents,
            tokens=now.tokens + by.tokens,
        )
        self._progress(self._state)
        if by.message is not None:
            self.message(by.message)

    def message(self, text: str) -> None:
        if text not in self._told:  # every worker may say the same
            self._told.add(text)
            self._progress(replace(self._state, message=text))
