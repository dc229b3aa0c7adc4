"""The installed DeepSpeed behaves as gpt/distributed/zero assumes about its internals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gpt.config.model import ModelConfig
from gpt.config.run import RunConfig
from gpt.distributed.zero.deepspeed_config import deepspeed_config
from tests.distributed.warm_torchrun import start_torchrun


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


OFFLOAD = {"offload_optimizer": "cpu"}


@pytest.mark.parametrize(
    ("precision", "micro_batch", "zero", "optimizer"),
    [
        ("fp32", 4, {"stage": 1}, {}),
        ("bf16", 2, {"stage": 1}, {"name": "muon"}),  # with tied embeddings
        ("fp16", 2, {"stage": 2}, {}),
        ("bf16", 2, {"stage": 2} | OFFLOAD, {"second_moment_init": "gradient"}),
        ("bf16", 2, {"stage": 3}, {"name": "muon", "moments": "bf16"}),
        ("bf16", 2, {"stage": 3, "offload_parameters": "cpu"} | OFFLOAD, {}),
    ],
)
def test_private_attributes_of_deepspeed_have_the_assumed_meaning(
    precision: str, micro_batch: int, zero: dict[str, object], optimizer: dict[str, object], tmp_path: Path
) -> None:
    batch = {"global_batch_tokens": 128, "micro_batch": micro_batch}
    is_tied = optimizer == {"name": "muon"}
    run = tiny(precision=precision, zero=zero, batch=batch, optimizer=optimizer)
    run = run.with_tables(model=ModelConfig.model_validate({**dict(run.model), "tie_embeddings": is_tied}))
    program = [str(Path(__file__).with_name("zero_contract.py")), run.model_dump_json()]
    log = tmp_path / "torchrun.log"
    start_torchrun(2, program, os.environ, log).wait(timeout=120)
    assert log.read_text().count("the contract holds") == 2, log.read_text()


def test_step_waits_for_the_device_once() -> None:
    """DeepSpeed waits to learn whether the gradient is finite; Outlast's own code never waits."""
    runs = [
        tiny(precision=precision, zero={"stage": stage}, batch=batch, optimizer={"name": name})
        for stage, precision, micro_batch, name in (
            (1, "bf16", 8, "adamw"),
            (1, "bf16", 4, "adamw"),
            (1, "fp32", 8, "adamw"),
            (2, "fp16", 4, "adamw"),
            (3, "bf16", 8, "muon"),
        )
        for batch in [{"global_batch_tokens": 128, "micro_batch": micro_batch}]
    ]
    world = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    script = str(Path(__file__).with_name("waits.py"))
    command = [sys.executable, script, *(run.model_dump_json() for run in runs)]
    environment = {**os.environ, **world, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("waits 1") == len(runs), done.stdout


def test_deepspeed_knows_every_key_of_the_generated_config() -> None:
    # DeepSpeed ignores misspelt top-level keys, so the names are looked up in its own constants.
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import TIMERS

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "zero_force_ds_cpu_optimizer", TIMERS}
    config = deepspeed_config(tiny(), world_size=1, has_gpu=False)
    assert config.keys() <= known
    zero_keys = DeepSpeedZeroConfig.model_fields
    aliases = {field.alias for field in zero_keys.values()}
    plus_plus = {"stage": 3, "quantized_weights": True, "quantized_gradients": True, "secondary_shards": 8}
    generated = deepspeed_config(tiny(zero=plus_plus), world_size=1, has_gpu=True)["zero_optimization"]
    assert generated.keys() <= zero_keys.keys() | aliases
    parsed = DeepSpeedZeroConfig(**generated)
    assert parsed.zero_quantized_weights and parsed.zero_quantized_gradients
    assert parsed.zero_hpz_partition_size == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 16 == 128


def test_bucket_sizes_follow_the_model_and_can_be_overridden() -> None:
    config = deepspeed_config(tiny(zero={"stage": 3}), world_size=1, has_gpu=False)["zero_optimization"]
    block = 2 * 24 + 4 * 24 * 24 + 3 * 24 * 64  # two norms, attention, SwiGLU of width 64
    assert config["stage3_prefetch_bucket_size"] == block
    assert config["stage3_param_persistence_threshold"] == 24  # the norms
    assert config["reduce_bucket_size"] == 2**24
    chosen = {"stage": 3, "bucket_numel": 7, "prefetch_numel": 8, "whole_below_numel": 9}
    config = deepspeed_config(tiny(zero=chosen), world_size=1, has_gpu=False)["zero_optimization"]
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    assert [config[name] for name in names] == [7, 8, 9]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero": {"stage": 0}}, "losses drift from those of the other stages. Use 1"),
        ({"zero": {"stage": 2, "quantized_weights": True}}, "needs zero.stage = 3"),
        ({"zero": {"stage": 1, "offload_parameters": "cpu"}}, "needs zero.stage = 3"),
        ({"precision": "fp32", "zero": {"stage": 3, "quantized_weights": True}}, "Use 'bf16'"),
        ({"zero": {"reduce_dtype": "fp16"}}, "neither 'fp32' nor precision = 'bf16'. Use one of them"),
        ({"zero": OFFLOAD, "optimizer": {"name": "muon"}}, "Use 'adamw', or no offload"),
        ({"optimizer": {"name": "muon"}, "model": {"initialization": "mup"}}, "Use one of them"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas.1\n *Input should be less than 1"),
        ({"seed": 2**64}, "seed\n *Input should be less than"),  # torch's generators take no more
        ({"launch": {"hang_timeout_s": 1200}}, "hang_timeout_s = 1200 must be less than launch.coll"),
    ],
)
def test_contradictory_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    model = {"n_layers": 1, "d_model": 24, "n_heads": 3, "context": 16, "vocab_size": 40}
    if "model" in fields:
        fields = {**fields, "model": model | fields["model"] | {"mup_base_width": 8}}
    with pytest.raises(ValidationError, match=message):
        tiny(**fields)


def test_zero_plus_plus_needs_gpus_and_whole_nodes() -> None:
    quantized = tiny(zero={"stage": 3, "quantized_gradients": True})
    assert "need GPUs" in (quantized.zero_problem(4, has_gpu=False) or "")
    run = tiny(zero={"stage": 3, "secondary_shards": 3})
    assert "does not divide the 4 processes" in (run.zero_problem(4, has_gpu=False) or "")
    assert run.zero_problem(6, has_gpu=False) is None
