"""The chunked loss compared with the usual one: 2,048 positions, 50,304 ids, width 768."""

import json
import subprocess
import sys
from typing import Any

import pytest


def measure(name: str, dtype: str) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.loss_memory", name, dtype, "2048", "768", "50304"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_loss_needs_a_third_of_the_memory_and_at_most_a_tenth_more_time(dtype: str) -> None:
    peak = {name: measure(name, dtype) for name in ("plain", "ours")}
    seconds = measure("both", dtype)
    memory_ratio, time_ratio = peak["ours"] / peak["plain"], seconds["ours"] / seconds["plain"]
    for name in ("plain", "ours"):
        print(f"\n{dtype} {name}: {peak[name] / 2**20:.0f} MiB, {seconds[name]:.2f} s")
    print(f"{memory_ratio:.2f}× the memory, {time_ratio:.2f}× the time")
    assert memory_ratio <= 1 / 3
    assert time_ratio <= 1.1
