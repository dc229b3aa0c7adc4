"""The lines of metrics.jsonl, each written when its numbers have reached the host, a step late.

On a GPU a step is only queued when its Python code has run. Whoever reads its loss at once waits for it and
leaves the device idle meanwhile; so the loss and the gradient norm of a step are read when the next one
is queued.
"""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.distributed.world import World
from gpt.run import record
from gpt.run.attempts import is_superseded
from gpt.run.run_dir import RunDir


class Late:
    """Numbers on their way from the device to the host."""

    def __init__(self, *numbers: Tensor) -> None:
        stacked = torch.stack([number.detach().double() for number in numbers])
        self._arrived = None
        if stacked.is_cuda:
            # pinned memory is the only one that a GPU copies to while the host goes on
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._host = stacked

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


@dataclass
class Line:
    """What is known of a step so far."""

    step: int
    fields: dict[str, float]
    numbers: Late  # this rank's summed loss, the gradient norm
    scored: float  # scored tokens of the step, over all ranks


class Lines:
    """The lines of one attempt; those that are not complete yet, at most two, wait here."""

    def __init__(self, run_dir: RunDir, world: World, attempt: int) -> None:
        self._run_dir, self._world, self._attempt = run_dir, world, attempt
        self._open: dict[int, Line] = {}
        self._unwritten: list[dict[str, float]] = []  # lines that a full disk did not take yet
        self._seconds: list[float] = []

    def begin(self, line: Line) -> None:
        """A step was queued."""
        self._open[line.step] = line

    def add(self, step: int, **fields: float) -> None:
        """More is known of `step`."""
        self._open[step].fields.update(fields)

    def loss_sum(self, step: int) -> float:
        """This rank's summed loss of `step`, waited for; 0 where that line is complete."""
        return self._open[step].numbers.read()[0] if step in self._open else 0.0

    def complete(self, step: int, loss_sum: float) -> None:
        """Write the line of `step`, whose loss over all ranks is `loss_sum`; nothing where that was done."""
        line = self._open.pop(step, None)
        if line is None:
            return
        self._seconds.append(line.fields["train/step_seconds"])
        if self._world.is_first:
            _, grad_norm = line.numbers.read()
            loss = {"train/loss": loss_sum / line.scored, "train/grad_norm": grad_norm}
            self._unwritten.append({"step": step, **line.fields, **loss})
            self.write()

    def write(self) -> None:
        """Append what is not in the record yet; what the disk does not take waits in memory."""
        while self._unwritten and not is_superseded(self._run_dir, self._attempt):
            try:
                record.append(self._run_dir.metrics, **self._unwritten[0])
            except OSError as error:
                with suppress(OSError):  # the log may lie on the same full disk
                    print(
                        f"{len(self._unwritten)} lines of the record wait for the disk: {error}", flush=True
                    )
                return
            del self._unwritten[0]

    @property
    def problem(self) -> str | None:
        """Why the record does not cover all steps, on rank 0: no checkpoint may be ahead of it."""
        if not self._unwritten:
            return None
        return f"{len(self._unwritten)} lines of the record cannot be written"

    def step_times(self) -> dict[str, float]:
        """Median and 99th percentile of the seconds that steps took, since this was last asked."""
        seconds, self._seconds = self._seconds, []
        if not seconds:
            return {}
        median, high = np.percentile(seconds, [50, 99])
        return {"train/step_seconds_p50": float(median), "train/step_seconds_p99": float(high)}
