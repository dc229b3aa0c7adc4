"""Run by torchrun from test_sharded_build.py: builds a network in less memory than it takes in fp32."""

import json
import resource
import sys
from pathlib import Path

import torch

from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from gpt.distributed.world import join
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.patches import import_deepspeed

run = RunConfig.model_validate(json.loads(sys.argv[1]))
world = join(60)
import_deepspeed(world.device)  # its own memory does not count
status = Path("/proc/self/status").read_text()
mapped = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
limit = mapped + 4 * parameter_count(run.model) * 3 // 4  # a quarter less than the fp32 weights take
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model = build_model(run, world)
if run.zero.stage < 3:
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    print("built in bf16", flush=True)
    sys.exit()
shards = sum(parameter.ds_tensor.numel() for parameter in model.parameters())  # type: ignore[attr-defined]
assert abs(shards * world.size - parameter_count(run.model)) < 1000
assert all(parameter.ds_tensor.dtype == torch.bfloat16 for parameter in model.parameters())  # type: ignore[attr-defined]
print("built in shards", flush=True)
