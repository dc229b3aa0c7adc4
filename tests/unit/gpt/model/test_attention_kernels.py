"""The table of attention kernels, and what it takes to add one: a row and a function."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.config.attention_kernels import ATTENTION_KERNELS, GpuRequirement, KernelSpec, kernel_spec
from gpt.config.model import ModelConfig
from gpt.model.attention import KERNELS, Documents, Scores, choose, obstacle, reference
from tests.unit.gpt.model.support import CPU, build, random_tokens, rows

TOY = KernelSpec(
    "toy", has_softcap=False, has_dropout=False, head_width_multiple=4, head_width_max=64, dtypes=("fp32",)
)
CALLS: list[Scores] = []


def toy(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor, documents: Documents, scores: Scores) -> Tensor:
    CALLS.append(scores)
    return reference(q_xhe, k_xke, v_xke, documents, scores)


@pytest.fixture
def toy_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds the toy kernel before all the others."""
    monkeypatch.setitem(KERNELS, "toy", toy)
    ATTENTION_KERNELS.insert(0, TOY)
    CALLS.clear()
    yield
    ATTENTION_KERNELS.remove(TOY)


@pytest.mark.usefixtures("toy_kernel")
@pytest.mark.parametrize("attention", ["auto", "toy"])
def test_a_kernel_is_added_by_one_row_and_one_function(attention: str) -> None:
    ours, formula = build(attention), build("reference")
    tokens = random_tokens(2, 24)
    assert ours.attention_name == "toy"
    assert torch.equal(ours.logits(tokens, rows(tokens)), formula.logits(tokens, rows(tokens)))
    assert len(CALLS) == 2  # one call per layer


@pytest.mark.usefixtures("toy_kernel")
@pytest.mark.parametrize(
    ("fields", "problem", "others"),
    [
        (
            {"attention_softcap": 9.0},
            "has no soft-cap, and model.attention_softcap = 9",
            "flash-2, reference",
        ),
        ({"dropout": 0.5}, "has no dropout, and model.dropout = 0.5", "flash-2, sdpa, reference"),
        (
            {"d_head": 68},
            "needs a head width that is a multiple of 4 up to 64, and it is 68",
            "sdpa, reference",
        ),
    ],
)
def test_a_config_that_a_kernel_does_not_support_is_refused_with_the_reason(
    fields: dict[str, object], problem: str, others: str
) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate({"attention": "toy", **fields})
    message = f"model.attention = 'toy' cannot compute this model: it {problem}. "
    assert message in str(error.value)
    assert all(f", {other}" in str(error.value) for other in others.split(", "))
    assert choose(ModelConfig.model_validate(fields), CPU, torch.float32)[0] != "toy"


@pytest.mark.usefixtures("toy_kernel")
def test_a_kernel_is_refused_for_another_dtype_with_the_reason() -> None:
    assert choose(ModelConfig(), CPU, torch.bfloat16)[0] == "sdpa"
    with pytest.raises(
        ConfigError, match=r"'toy' cannot run here: it computes in fp32, not bf16. Use 'auto'"
    ):
        choose(ModelConfig(attention="toy"), CPU, torch.bfloat16)


def test_a_kernel_is_refused_for_its_device_or_package_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = GpuRequirement((9,), "Hopper", "no_such_module", "no-such-package", {9: range(60, 70)})
    kernel, model = replace(TOY, dtypes=None, gpu=gpu), ModelConfig(d_head=32)
    assert obstacle(kernel, model, CPU, torch.float32) == "it needs a CUDA device, this is cpu"
    monkeypatch.setattr("gpt.model.hardware.compute_capability", lambda _: (8, 6))
    needed = "it needs Hopper, this GPU has compute capability 8.6"
    assert obstacle(kernel, model, CPU, torch.float32) == needed
    monkeypatch.setattr("gpt.model.hardware.compute_capability", lambda _: (9, 0))
    missing = "the package no-such-package is not installed"
    assert obstacle(kernel, model, CPU, torch.float32) == missing
    wide = "on compute capability 9.0 it has no head width of 64"
    assert obstacle(kernel, ModelConfig(d_head=64), CPU, torch.float32) == wide


def test_every_row_has_a_function_and_the_last_one_has_no_requirements() -> None:
    assert [kernel.name for kernel in ATTENTION_KERNELS] == list(KERNELS)
    assert KernelSpec("reference") == ATTENTION_KERNELS[-1] == kernel_spec("reference")


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValidationError, match=r"'toy' is not a kernel. Known: auto, flash-4, flash-3, flash-2"
    ):
        ModelConfig(attention="toy")
    schema = ModelConfig.model_json_schema()
    assert schema["properties"]["attention"]["enum"] == ["auto", *KERNELS]
