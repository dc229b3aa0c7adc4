"""Which checkpoints may hold damaged weights, from the events of the run.

One NaN among the weights makes every later gradient NaN: from then on each update is left out, while the
steps and the checkpoints go on. Retention must keep a checkpoint from before that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt.run.events import Event, read_events


@dataclass(frozen=True)
class Doubt:
    """Steps whose checkpoints hold weights that are not finite, and the steps whose updates were left out."""

    not_finite: frozenset[int] = frozenset()
    left_out: frozenset[int] = frozenset()

    def must_keep(self, steps: Iterable[int]) -> set[int]:
        """The checkpoints among those of `steps` to go back to, whatever retention says of them.

        They are the newest one with finite weights, and the newest one from before the unbroken row of
        left-out updates that reaches the newest step.
        """
        ordered = sorted(steps)
        if not ordered:
            return set()
        first = ordered[-1]
        while first in self.left_out:
            first -= 1
        sound = [step for step in ordered if step not in self.not_finite]
        before = [step for step in sound if step <= first]
        return {*sound[-1:], *before[-1:]}


def doubt_of(events: Path) -> Doubt:
    """The doubt about the checkpoints of a run, from its events.jsonl."""
    not_finite: set[int] = set()
    left_out: set[int] = set()
    kinds = (
        Event.UPDATE_SKIPPED,
        Event.CHECKPOINT_SAVED,
        Event.CHECKPOINT_NOT_FINITE,
        Event.RESUMED,
        Event.CONTINUED,
    )
    for line in read_events(events, *kinds):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        match line["event"]:
            case Event.UPDATE_SKIPPED:
                left_out.add(step)
            case Event.CHECKPOINT_SAVED:  # perhaps again, after going back
                not_finite.discard(step)
            case Event.CHECKPOINT_NOT_FINITE:
                not_finite.add(step)
            case _:  # later steps are taken again
                left_out = {left for left in left_out if left <= step}
    return Doubt(frozenset(not_finite), frozenset(left_out))
