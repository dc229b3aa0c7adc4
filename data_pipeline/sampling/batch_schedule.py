"""How large each step's global batch is, and so which places of the order a step uses: closed forms.

A ramp is a list of stages, each of some steps at one size, before the final size holds for ever. Sizes are
in any unit (sequences for a reader, tokens for a plan): nothing here knows which.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class BatchSizes:
    """The size of step n, n from 1: the stages of `warmup`, each (steps, size), then `final`."""

    def __init__(self, final: int, warmup: Sequence[tuple[int, int]] = ()) -> None:
        self.final = final
        self._warmup = tuple(warmup)
        self._sizes = [*(size for _, size in warmup), final]
        # The last step of each stage, and how much is used once it is done.
        self._last = list(accumulate((steps for steps, _ in warmup), initial=0))
        self._used = list(accumulate((steps * size for steps, size in warmup), initial=0))

    def over(self, divisor: int) -> "BatchSizes":
        """The same steps in another unit, `divisor` times as large."""
        return BatchSizes(self.final // divisor, [(n, size // divisor) for n, size in self._warmup])

    def at(self, step: int) -> int:
        """The size of `step`."""
        return self._sizes[bisect_left(self._last, step) - 1]

    def until(self, step: int) -> int:
        """How much the steps up to and with `step` use together."""
        stage = max(0, bisect_left(self._last, step) - 1)
        return self._used[stage] + (step - self._last[stage]) * self._sizes[stage]

    def steps_for(self, amount: int) -> int:
        """The least number of steps that use at least `amount` together."""
        stage = max(0, bisect_right(self._used, amount - 1) - 1)
        return self._last[stage] - (self._used[stage] - amount) // self._sizes[stage]
