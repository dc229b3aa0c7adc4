"""Gradients summed over ranks and micro-batches have the same norm at every ZeRO stage."""

from collections.abc import Callable

import pytest
import torch

from gpt.distributed.zero.patches import squared_norm
from tests.distributed.conftest import Run


def test_bf16_gradients_have_the_same_norm_at_every_stage(new_run: Callable[..., Run]) -> None:
    """With sums in bf16 the norms of two ranks and two micro-batches differ by 1e-5 of their value."""
    norms = []
    for stage in (1, 2, 3):
        run = new_run(
            precision="bf16",
            zero__stage=stage,
            batch__micro_batch=2,
            schedule__total_steps=1,
            schedule__warmup_steps=0,
            launch__node_check=False,
        )
        assert run.train(2)["exit_code"] == 0
        norms.append(run.metrics()[0]["train/grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_of_many_elements_is_exact_on_a_cpu(dtype: torch.dtype) -> None:
    gradients = [torch.full((3_000_001,), 0.1).to(dtype), torch.full((7, 5), -0.5).to(dtype), torch.zeros(0)]
    expected = sum(float(g.double().square().sum()) for g in gradients)
    assert float(squared_norm(gradients, torch.device("cpu"))) == pytest.approx(expected, rel=1e-6)
    assert float(squared_norm([torch.zeros(0)], torch.device("cpu"))) == 0.0
    gradients[1][3, 3] = float("nan")
    assert not torch.isfinite(squared_norm(gradients, torch.device("cpu")))
