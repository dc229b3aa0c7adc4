"""The settings that decide how a GPU rounds, as the worker makes them."""

from collections.abc import Iterator

import pytest
import torch

from gpt.training.numerics import set_rounding


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def test_parts_of_16_bit_products_are_summed_in_fp32() -> None:
    set_rounding()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
