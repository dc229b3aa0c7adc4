"""The size of each step's global batch, and the positions of the order that a step uses, in closed form.

A schedule is a list of stages, each with a number of steps and a size, followed by the final size. Sizes may
have any unit: a reader counts sequences, a plan counts tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class BatchSizes:
    """The size of step n, counted from 1: the stages of `warmup`, pairs (steps, size), then `final`."""

    def __init__(self, final: int, warmup: Sequence[tuple[int, int]] = ()) -> None:
        self.final = final
        self._warmup = tuple(warmup)
        self._sizes = [*(size for _, size in warmup), final]
        # The last step of each stage, and the total of all sizes up to it; both start with 0.
        self._last = list(accumulate((steps for steps, _ in warmup), initial=0))
        self._used = list(accumulate((steps * size for steps, size in warmup), initial=0))

    def over(self, divisor: int) -> "BatchSizes":
        """The same schedule in a unit that is `divisor` times as large."""
        return BatchSizes(self.final // divisor, [(n, size // divisor) for n, size in self._warmup])

    def at(self, step: int) -> int:
        """The size of `step`."""
        return self._sizes[bisect_left(self._last, step) - 1]

    def until(self, step: int) -> int:
        """The sum of the sizes of all steps up to and including `step`."""
        stage = max(0, bisect_left(self._last, step) - 1)
        return self._used[stage] + (step - self._last[stage]) * self._sizes[stage]

    def steps_for(self, amount: int) -> int:
        """The smallest number of steps whose sizes add up to at least `amount`."""
        stage = max(0, bisect_right(self._used, amount - 1) - 1)
        return self._last[stage] - (self._used[stage] - amount) // self._sizes[stage]
