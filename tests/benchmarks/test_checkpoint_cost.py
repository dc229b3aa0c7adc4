"""A checkpoint of a hundred million parameters, beside DeepSpeed's and torch's own in the same run."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from gpt.config import RunConfig

pytestmark = pytest.mark.benchmark
MODEL = {"n_layers": 10, "d_model": 768, "n_heads": 12, "context": 128, "vocab_size": 24576, "d_ff": 2048}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cost")
    tables = {
        "name": "cost",
        "precision": "bf16",
        "model": MODEL,
        "data": {"path": "/nowhere"},
        "batch": {"global_batch_tokens": 2 * 128, "micro_batch": 1},
        "schedule": {"total_steps": 1000},
        "checkpoint": {"keep_last": 2},
    }
    config = folder / "config.json"
    config.write_text(validate(RunConfig, tables, "test").resolve(0).model_dump_json())
    script = str(Path(__file__).with_name("checkpoint_cost.py"))
    out = folder / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, str(config), str(folder), str(out)],
        env=environment, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    plain = statistics.median(result["steps_before_s"] + result["steps_after_s"])
    print(f"\n{result['parameters']:,} parameters; memcpy {result['memcpy_s']:.3f} s; a step {plain:.2f} s; ")
    print(f"reading safetensors {result['read_safetensors_s']:.2f} s")
    for name in ("ours", "deepspeed", "dcp"):
        it = result[name]
        during = statistics.median(it["steps_while_writing_s"] or [plain])
        print(
            f"{name:10} stall {it['stall_s']:.3f} s (first {it['first_stall_s']:.3f}), "
            f"{it['stall_s'] / result['memcpy_s']:.1f} memcpys; a step meanwhile {during / plain:.2f}; "
            f"{it['bytes'] / result['parameters']:.2f} bytes a parameter; load {it['load_s']:.2f} s"
        )
    return {**result, "step_s": plain}


def test_the_stall_is_a_memcpy(measured: dict[str, Any]) -> None:
    assert measured["ours"]["stall_s"] <= 1.5 * measured["memcpy_s"]
    assert measured["ours"]["stall_s"] < measured["deepspeed"]["stall_s"] / 3
    assert measured["ours"]["stall_s"] < measured["dcp"]["stall_s"]


def test_steps_are_hardly_slower_while_it_is_written(measured: dict[str, Any]) -> None:
    during = statistics.median(measured["ours"]["steps_while_writing_s"])
    assert during <= 1.10 * measured["step_s"]


def test_it_takes_twelve_bytes_a_parameter(measured: dict[str, Any]) -> None:
    assert measured["ours"]["bytes"] <= 1.01 * 12 * measured["parameters"]


def test_it_loads_in_half_of_deepspeeds_time(measured: dict[str, Any]) -> None:
    assert measured["ours"]["load_s"] <= 0.5 * measured["deepspeed"]["load_s"]
