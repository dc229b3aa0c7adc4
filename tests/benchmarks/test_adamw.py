"""AdamW's update on a CPU: ours, torch's loop, and DeepSpeed's kernel, which is compiled at first use.

`pytest -m benchmark -s tests/benchmarks/test_adamw.py`
"""

import os
import time

import pytest
import torch

from gpt.config.optimizer import OptimizerConfig
from gpt.optimizer.adamw import AdamW

PARAMETERS = 30_000_000


def parameter() -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.randn(PARAMETERS))
    made.grad = torch.randn(PARAMETERS) * 1e-3
    return made


def seconds(optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


@pytest.mark.benchmark
def test_our_adamw_is_as_fast_as_the_fastest_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.set_num_threads(1)
    rates = {"lr": 1e-3, "weight_decay": 0.1}
    optimizers = {
        "ours": AdamW(
            [{"params": [parameter()], "weight_decay": 0.1}], OptimizerConfig(peak_lr=1e-3), torch.float32
        ),
        "torch, foreach": torch.optim.AdamW([parameter()], foreach=True, **rates),
        "DeepSpeedCPUAdam": DeepSpeedCPUAdam([parameter()], adamw_mode=True, **rates),
    }
    turns = [{name: seconds(optimizer) for name, optimizer in optimizers.items()} for _ in range(20)]
    best = {name: min(turn[name] for turn in turns) for name in optimizers}
    for name, took in best.items():
        print(f"\n{name}: {took * 1e3:.0f} ms, {PARAMETERS * 28 / took / 1e9:.1f} GB/s")
    assert best["ours"] <= 1.1 * min(best.values())
