"""The network's speed and memory compared with peers: a step, attention inside documents, recomputation."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model.attention import Documents, Scores, sdpa
from gpt.model.flops import flops_per_token
from tests.benchmarks.step_speed import BATCH, MODEL


def measured(module: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_is_no_slower_than_transformers_and_hand_written_networks(dtype: str) -> None:
    found = measured("step_speed", dtype, "7")
    tokens = BATCH * MODEL.context
    floor_s = flops_per_token(MODEL) * tokens / found["matmul"]
    print(f"\n{dtype}, {tokens} tokens a step; matrix products reach {found['matmul'] / 1e12:.2f} TFLOP/s")
    for name, seconds in found["seconds"].items():
        speed, share, first = tokens / seconds, floor_s / seconds, found["first"][name]
        print(f"{name:22} {seconds:6.2f} s {speed:8.0f} tokens/s {share:6.1%} of that, first {first:5.1f} s")
    seconds = found["seconds"]
    assert seconds["ours eager"] <= seconds["transformers eager"]
    assert seconds["ours compiled"] <= seconds["minimal compiled"]
    assert 1.15 * seconds["ours compiled"] <= seconds["transformers compiled"]


@pytest.mark.benchmark
@pytest.mark.parametrize("length", [32, 128, 512])
def test_attention_inside_documents_is_faster_than_a_dense_mask(length: int) -> None:
    """4,096 tokens in rows of 1,024, with documents of uneven lengths and this mean length."""
    torch.set_num_threads(2)
    generator = np.random.default_rng(1)
    cuts = generator.choice(np.arange(1, 4096), 4096 // length, replace=False)
    ends = np.unique(np.concatenate([cuts, np.arange(1024, 4097, 1024)])).astype(np.int32)
    documents = Documents.from_ends(ends)
    number = torch.bucketize(torch.arange(4096), documents.cumulative_n1[1:], right=True).view(4, 1024)
    mask = (number[:, :, None] == number[:, None, :]).tril()[:, None]
    q, k, v = (torch.randn(4096, 8, 64).bfloat16().requires_grad_() for _ in range(3))

    def dense() -> Tensor:
        rows = (x.view(4, 1024, 8, 64).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2).reshape(4096, 8, 64)

    def ours() -> Tensor:
        return sdpa(q, k, v, documents, Scores())

    torch.testing.assert_close(ours(), dense(), rtol=2e-2, atol=2e-2)

    def seconds(attend: Callable[[], Tensor]) -> float:
        started = time.perf_counter()
        attend().sum().backward()
        return time.perf_counter() - started

    turns = [(seconds(ours), seconds(dense)) for _ in range(5)]
    ours_s, dense_s = (min(turn[i] for turn in turns) for i in (0, 1))
    print(f"\n{len(ends)} documents: {ours_s * 1e3:.0f} ms, dense mask {dense_s * 1e3:.0f} ms")
    assert ours_s < dense_s


@pytest.mark.benchmark
def test_recomputation_saves_memory() -> None:
    found = {how: measured("recompute_memory", how) for how in ("none", "selective", "full")}
    for how, at in found.items():
        print(f"\n{how}: {at['bytes'] / 2**20:.0f} MiB, {at['seconds']:.2f} s")
    assert found["full"]["bytes"] < found["selective"]["bytes"] < found["none"]["bytes"]
