"""The settings that decide how a GPU rounds, as the worker makes them."""

import os
from collections.abc import Iterator

import pytest
import torch

from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.model import attention, hardware
from gpt.training.numerics import set_rounding


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    is_filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = is_filled
    torch.use_deterministic_algorithms(False)
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def test_parts_of_16_bit_products_are_summed_in_fp32() -> None:
    set_rounding(is_deterministic=False)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()
    assert "NCCL_ALGO" not in os.environ and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_run_fixes_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")  # with it torch would refuse every product
    set_rounding(is_deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    assert (os.environ["NCCL_ALGO"], os.environ["NCCL_PROTO"]) == ("Tree", "Simple")


@pytest.mark.parametrize(
    ("kernel", "capability", "head_width"), [("flash-3", (9, 0), 256), ("flash-4", (12, 0), 64)]
)
def test_kernel_whose_gradients_vary_is_refused_and_passed_over(
    kernel: str, capability: tuple[int, int], head_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "compute_capability", lambda _: capability)
    monkeypatch.setattr(attention, "is_installed", lambda _: True)
    shape = {"n_layers": 1, "d_model": 2 * head_width, "n_heads": 2, "context": 8, "vocab_size": 8}
    named = ModelConfig.model_validate({**shape, "attention": kernel})
    auto = ModelConfig.model_validate(shape)
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert attention.choose(named, cuda, bf16)[0] == kernel
    set_rounding(is_deterministic=True)
    assert attention.choose(auto, cuda, bf16)[0] != kernel
    with pytest.raises(ConfigError, match=r"deterministic = true, and on compute capability .* differ"):
        attention.choose(named, cuda, bf16)
