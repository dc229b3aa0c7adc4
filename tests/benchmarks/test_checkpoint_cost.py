"""The cost of a checkpoint of 100 M parameters, compared with DeepSpeed and torch in the same run."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from gpt.config.run import RunConfig

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
    memcpy_s, parameters = result["memcpy_s"], result["parameters"]
    print(f"\n{parameters:,} parameters; a copy of a rank's state takes {memcpy_s:.3f} s")
    print(f"reading a rank's file with safetensors {result['read_safetensors_s']:.2f} s")
    for name in ("ours", "deepspeed", "dcp"):
        it = result[name]
        meanwhile = f"a step meanwhile {slower(it):.2f}; " if it["steps_while_writing_s"] else ""
        print(
            f"{name:10} stall {it['stall_s']:.3f} s (first {it['first_stall_s']:.3f}), "
            f"{it['stall_s'] / memcpy_s:.1f} copies; {meanwhile}"
            f"{it['bytes'] / parameters:.2f} bytes a parameter; load {it['load_s']:.2f} s from the disk, "
            f"{it['load_from_memory_s']:.2f} s from the page cache"
        )
    return result


def slower(of_one: dict[str, Any]) -> float:
    """Seconds of a step while a checkpoint is written, over those of a step between two."""
    return statistics.median(of_one["steps_while_writing_s"]) / statistics.median(of_one["steps_between_s"])


def test_stall_of_a_save_is_a_memory_copy(measured: dict[str, Any]) -> None:
    assert measured["ours"]["stall_s"] <= 1.5 * measured["memcpy_s"]
    assert measured["ours"]["stall_s"] < measured["deepspeed"]["stall_s"] / 3
    assert measured["ours"]["stall_s"] < measured["dcp"]["stall_s"]


def test_steps_are_hardly_slower_during_a_save(measured: dict[str, Any]) -> None:
    assert slower(measured["ours"]) <= 1.10


def test_checkpoint_takes_twelve_bytes_per_parameter(measured: dict[str, Any]) -> None:
    assert measured["ours"]["bytes"] <= 1.01 * 12 * measured["parameters"]


def test_checkpoint_loads_in_half_of_deepspeeds_time(measured: dict[str, Any]) -> None:
    assert measured["ours"]["load_s"] <= 0.5 * measured["deepspeed"]["load_s"]
