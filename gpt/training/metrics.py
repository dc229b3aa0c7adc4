"""The lines of metrics.jsonl. A step's line is written one step late, once its numbers are on the host.

On a GPU a step is only queued when its Python code has run. Reading its loss at once would wait for the
device and leave it idle afterwards, so the numbers of a step are read when the next step is queued.

To add a number, return it by its name from `train_step` or `Engine.step`: it appears in every line. A number
whose value differs between ranks also gets a row in `REDUCTIONS`; without one, rank 0's value is written.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.distributed.reduction import Reduction
from gpt.distributed.world import World
from gpt.model.hardware import Event, accelerator
from gpt.run import record
from gpt.run.attempts import is_superseded
from gpt.run.run_dir import RunDir

# How the values of the ranks become one, for every number that the ranks exchange at a step boundary.
REDUCTIONS: Mapping[str, Reduction] = {
    "train/loss": Reduction.SUM,
    "data/digest": Reduction.SUM,
    # What the ranks agree on besides metrics. Yes/no values are summed to the number of ranks that say yes.
    "scored_ahead": Reduction.SUM,
    "stop": Reduction.SUM,
    "error": Reduction.SUM,
    "save_due": Reduction.SUM,
    "save_done": Reduction.SUM,
    "save_failed": Reduction.SUM,
}
# Sums that are written divided by the scored tokens of the step, over all ranks.
_PER_SCORED_TOKEN = frozenset({"train/loss"})


class DeferredScalars:
    """Named numbers on their way from the device to the host, in one copy."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self._names = tuple(numbers)
        stacked = torch.stack([number.detach().double() for number in numbers.values()])
        self._arrived: Event | None = None
        if (gpu := accelerator(stacked.device)) is not None:
            # A GPU copies to the host without blocking it only when the memory is pinned.
            self._host = gpu.pinned(len(stacked), stacked.dtype)
            self._host.copy_(stacked, non_blocking=True)
            self._arrived = gpu.event()
            self._arrived.record()
        else:
            self._host = stacked

    def read(self) -> dict[str, float]:
        """The numbers by name; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))


@dataclass
class _Line:
    """What is known about a step so far."""

    fields: dict[str, float]
    numbers: DeferredScalars  # this rank's
    scored_tokens: float  # of the step, over all ranks


class MetricsWriter:
    """Writes the lines of one attempt. At most two lines are incomplete at a time."""

    def __init__(self, run_dir: RunDir, world: World, attempt: int) -> None:
        self._run_dir, self._world, self._attempt = run_dir, world, attempt
        self._open: dict[int, _Line] = {}
        self._unwritten: list[dict[str, float]] = []  # lines that a full disk has not taken yet
        self._seconds: list[float] = []

    def begin(
        self, step: int, fields: dict[str, float], numbers: DeferredScalars, scored_tokens: float
    ) -> None:
        """Start the line of `step`, which has just been queued."""
        self._open[step] = _Line(fields, numbers, scored_tokens)

    def add(self, step: int, **fields: float) -> None:
        """Add fields to the line of `step`."""
        self._open[step].fields.update(fields)

    def to_reduce(self, step: int) -> dict[str, float]:
        """This rank's numbers of `step` that differ between ranks; none when that line is complete.

        Waits for the device.
        """
        if step not in self._open:
            return {}
        numbers = self._open[step].numbers.read()
        return {name: value for name, value in numbers.items() if name in REDUCTIONS}

    def complete(self, step: int, reduced: Mapping[str, float]) -> None:
        """Write the line of `step` with the numbers `reduced` over the ranks. Nothing if it is complete."""
        line = self._open.pop(step, None)
        if line is None:
            return
        self._seconds.append(line.fields["train/step_seconds"])
        if self._world.is_first:
            numbers = line.numbers.read()
            for name in numbers.keys() & REDUCTIONS.keys():
                divisor = line.scored_tokens if name in _PER_SCORED_TOKEN else 1.0
                numbers[name] = reduced[name] / divisor
            self._unwritten.append({"step": step, **line.fields, **numbers})
            self.write()

    def write(self) -> None:
        """Append the complete lines to metrics.jsonl; lines that a full disk refuses are kept in memory."""
        while self._unwritten and not is_superseded(self._run_dir, self._attempt):
            try:
                record.append(self._run_dir.metrics, **self._unwritten[0])
            except OSError as error:
                with suppress(OSError):  # the log may be on the same full disk
                    print(
                        f"{len(self._unwritten)} lines of {self._run_dir.metrics.name} wait for the disk: "
                        f"{error}",
                        flush=True,
                    )
                return
            del self._unwritten[0]

    @property
    def problem(self) -> str | None:
        """Why metrics.jsonl lacks steps, on rank 0; until it is complete, no checkpoint may be committed."""
        if not self._unwritten:
            return None
        return f"{len(self._unwritten)} lines of {self._run_dir.metrics.name} cannot be written"

    def step_times(self) -> dict[str, float]:
        """The median and the 99th percentile of the step times since the last call."""
        seconds, self._seconds = self._seconds, []
        if not seconds:
            return {}
        median, high = np.percentile(seconds, [50, 99])
        return {"train/step_seconds_p50": float(median), "train/step_seconds_p99": float(high)}
