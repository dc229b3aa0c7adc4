"""The optimizers over 50 steps, against torch's or a loop written from the paper."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gpt.config.optimizer import OptimizerConfig
from gpt.optimizer.adamw import AdamW
from gpt.optimizer.muon import MuonAdamW, rate_factor, scaled_update
from gpt.optimizer.whole_matrices import Fragment, MatrixExchange, ShardedMatrices

STEPS = 50
SHAPES = {"tall": (24, 8), "wide": (6, 40), "square": (16, 16)}


def weights(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()
    }


def gradient(step: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES[name], generator=generator) * (1 + step % 7)


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradient(step, name)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def ours(parameters: dict[str, Tensor], **fields: Any) -> AdamW:
    config = OptimizerConfig.model_validate({"peak_lr": 1e-2, "weight_decay": 0.1, **fields})
    return AdamW([{"params": list(parameters.values()), "weight_decay": 0.1}], config, torch.float32)


def test_adamw_equals_torchs() -> None:
    mine, theirs = weights(), weights()
    reference = torch.optim.AdamW(list(theirs.values()), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    assert_equal(train(ours(mine), mine), train(reference, theirs), rtol=1e-5)


def test_gi_adam_equals_the_published_update() -> None:
    """Written from the authors' code: v_0 = g_1², then Adam's update with its bias correction."""
    mine = weights()
    found = train(ours(mine, second_moment_init="gradient"), mine)
    beta1, beta2, lr, eps = 0.9, 0.95, 1e-2, 1e-8
    for name, parameter in weights().items():
        weight = parameter.detach().double()
        m, v = torch.zeros_like(weight), gradient(0, name).double() ** 2
        for step in range(STEPS):
            g = gradient(step, name).double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
            weight = weight * (1 - lr * 0.1) - lr * m_hat / (v_hat.sqrt() + eps)
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-6)


def test_gi_adam_starts_with_smaller_steps_like_a_warmup() -> None:
    mine = weights()
    before = {name: p.detach().clone() for name, p in mine.items()}
    optimizer = ours(mine, second_moment_init="gradient", weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for name, parameter in mine.items():
        parameter.grad = gradient(0, name)
    optimizer.step()
    for name, parameter in mine.items():  # η √(1 - β2) · sign(g), where Adam's is η · sign(g)
        moved = (before[name] - parameter.detach()) / 1e-2
        torch.testing.assert_close(moved, 0.05**0.5 * gradient(0, name).sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["zero", "gradient"])
def test_bf16_moments_train_close_to_fp32_moments(init: str) -> None:
    exact, rounded = weights(), weights()
    optimizer = ours(rounded, moments="bf16", second_moment_init=init)
    expected = train(ours(exact, second_moment_init=init), exact)
    found = train(optimizer, rounded)
    for name, start in weights().items():
        way = (expected[name] - start).norm()
        assert 0 < (found[name] - expected[name]).norm() < 0.02 * way  # bf16 keeps 8 bits: 0.4% a step
    state = optimizer.state[rounded["tall"]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_bf16_moments_with_a_large_beta2_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"betas\[1\] of at most 0.99"):
        OptimizerConfig(moments="bf16", betas=(0.9, 0.999))


def flat(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.nn.Parameter(p.detach().reshape(-1)) for name, p in parameters.items()}


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 1e-8)]
)
def test_muon_equals_torchs(dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float32:  # torch always iterates in bf16; this makes it iterate in fp32
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    mine, theirs = flat(weights()), weights()
    for step in range(STEPS):
        for name in SHAPES:
            theirs[name].grad = size * gradient(step, name)
            mine[name].grad = theirs[name].grad.reshape(-1).clone()
        if step == 0:
            optimizer = flat_muon(mine, dtype)
            reference = torch.optim.Muon(
                list(theirs.values()), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            )
        optimizer.step()
        reference.step()
    rtol = 1e-4 if dtype == torch.float32 else 0.02
    for name, shape in SHAPES.items():
        difference = (mine[name].detach().view(shape) - theirs[name].detach()).norm()
        assert difference < rtol * theirs[name].detach().norm()


def flat_muon(parameters: dict[str, Tensor], dtype: torch.dtype) -> MuonAdamW:
    config = OptimizerConfig(name="muon", peak_lr=1e-2)
    group = {"params": list(parameters.values()), "weight_decay": 0.1, "momentum": config.momentum}
    optimizer = MuonAdamW([group], config, dtype)
    for name, parameter in parameters.items():
        rows, columns = SHAPES[name]
        matrices = ShardedMatrices((rows,), columns, (Fragment(0, 0, parameter.numel()),))
        optimizer.use_exchange(parameter, MatrixExchange([matrices], rank=0, world_size=1))
    return optimizer


def test_stacked_matrices_are_orthogonalised_one_by_one() -> None:
    stacked = torch.randn(20, 8)
    matrices = ShardedMatrices((12, 8), 8, (Fragment(0, 0, 160),))
    update = matrices.apply(scaled_update, stacked.reshape(-1)).view(20, 8)
    for part in update.split((12, 8)):
        singular = torch.linalg.svdvals(part) / rate_factor(*part.shape)
        assert singular.min() > 0.5 and singular.max() < 1.3


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-6)
