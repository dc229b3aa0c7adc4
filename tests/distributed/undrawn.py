"""The worker, which fails when it draws initial weights: a resumed run does not need them."""

import os
import sys
from pathlib import Path
from typing import Any

import gpt.distributed.zero.build
import gpt.model.gpt
from gpt.train import STOP, main


def refuse(*_: Any) -> None:
    raise AssertionError("a resumed run draws initial weights")


gpt.model.gpt.initialize = gpt.distributed.zero.build.initialize = refuse
STOP.install()
main(Path(sys.argv[1]))
sys.stdout.flush()
os._exit(0)
