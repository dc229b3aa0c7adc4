"""No rank ever holds the whole network in fp32, and at stage 3 not even in bf16, while it is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_zero_contract import tiny


@pytest.mark.parametrize(("stage", "done_as"), [(3, "built in shards"), (1, "built in bf16")])
def test_network_that_exceeds_the_memory_of_a_rank_can_be_built(stage: int, done_as: str) -> None:
    """100 M parameters take 400 MB in fp32; each process may use 300 MB on top of its imports."""
    model = {"n_layers": 8, "d_model": 1024, "n_heads": 8, "context": 64, "vocab_size": 512}
    run = tiny(
        precision="bf16",
        zero={"stage": stage},
        model=model,
        batch={"global_batch_tokens": 128, "micro_batch": 1},
    )
    script = str(Path(__file__).with_name("sharded_build.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", script, run.model_dump_json()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count(done_as) == 2, done.stdout + done.stderr
