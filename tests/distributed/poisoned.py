"""The worker, whose master weights become NaN after step 5, as broken memory would make them."""

import math
import os
import sys
from pathlib import Path

from torch import Tensor

from gpt.distributed.zero.engine import Engine
from gpt.train import STOP, main

step = Engine.step


def poisoned(self: Engine, lr: float) -> dict[str, Tensor]:
    numbers = step(self, lr)
    if numbers:
        taken = getattr(self, "taken", 0) + 1
        self.taken = taken  # type: ignore[attr-defined]
        if taken == 5:
            for part in self.state():
                if part.state == "master":
                    part.tensor.fill_(math.nan)
    return numbers


Engine.step = poisoned  # type: ignore[method-assign]
STOP.install()
main(Path(sys.argv[1]))
sys.stdout.flush()
os._exit(0)
