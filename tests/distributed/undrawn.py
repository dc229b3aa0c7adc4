"""The worker, which fails where it would draw initial weights: a run that goes on has no use for them."""

import os
import sys
from pathlib import Path
from typing import Any

import gpt.distributed.zero.build
import gpt.model.gpt
from gpt.train import STOP, main


def refuse(*_: Any) -> None:
    raise AssertionError("initial weights are drawn, and nobody needs them")


gpt.model.gpt.initialize = gpt.distributed.zero.build.initialize = refuse
STOP.install()
main(Path(sys.argv[1]))
sys.stdout.flush()
os._exit(0)
