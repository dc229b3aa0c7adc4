"""What gpt/zero.py takes for granted about DeepSpeed's internals, on the installed version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.config import RunConfig
from gpt.zero import deepspeed_config


def tiny(**fields: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "contract",
            "model": {"n_layers": 1, "d_model": 24, "n_heads": 3, "context": 16, "vocab_size": 40},
            "data": {"path": "none"},
            "batch": {"global_batch_tokens": 128, "micro_batch": 2},
            "schedule": {"total_steps": 1},
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("stage", "precision", "micro_batch"), [(1, "fp32", 4), (1, "bf16", 2), (2, "bf16", 2), (3, "bf16", 2)]
)
def test_the_private_attributes_mean_what_we_think(stage: int, precision: str, micro_batch: int) -> None:
    batch = {"global_batch_tokens": 128, "micro_batch": micro_batch}
    run = tiny(precision=precision, zero={"stage": stage}, batch=batch)
    script = Path(__file__).with_name("zero_contract.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script), run.model_dump_json()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("the contract holds") == 2, done.stdout + done.stderr


def test_no_key_of_the_generated_config_is_unknown_to_deepspeed() -> None:
    # DeepSpeed ignores misspelt top-level keys, so the names are looked up in its own constants.
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {"zero_optimization"}
    config = deepspeed_config(tiny(), world_size=1, has_gpu=False)
    assert config.keys() <= known
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 16 == 128
