"""Run by torchrun from test_resume.py: loads the newest checkpoint of a run and saves it as the next step."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from gpt.config.run import RunConfig
from gpt.distributed.world import join
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.engine import Engine
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.restore import load_newest
from gpt.saving.saver import Saver

run_dir = RunDir(Path(sys.argv[1]))
run = RunConfig.model_validate_json(run_dir.config.read_text())
world = join(60)
model = build_model(run.model_copy(update={"seed": 99}), world)  # the load must replace all of it
engine = Engine(model, run, world)
fingerprint = sys.argv[2]
loaded = load_newest(run_dir, engine, world, fingerprint, is_begun=True)
assert loaded is not None
attempt = run_dir.attempt_numbers()[-1]
saver = Saver(
    run_dir,
    engine,
    world,
    attempt=attempt,
    data_fingerprint=fingerprint,
    heartbeat=Heartbeat(),
    stop=StopFlag(),
)
saver.save_and_wait(loaded.step + 1, loaded.skipped)
dist.barrier(group=world.control)
dist.destroy_process_group()  # a process that exits with open connections may abort
os._exit(0)  # gpt.train explains why
