"""The search for the critical rate, on losses whose critical rate is known."""

import math

import pytest

from gpt.training.auto_warmup import critical_rate


@pytest.mark.parametrize("sharpness", [0.7, 3.0, 40.0])
def test_critical_rate_of_a_parabola_is_two_over_its_sharpness(sharpness: float) -> None:
    """Gradient descent on λx²/2 from x = 1: the loss rises above η = 2/λ (LeCun et al.)."""
    found = critical_rate(
        lambda lr: 0.5 * sharpness * (1 - lr * sharpness) ** 2, 0.5 * sharpness, peak_lr=4.0
    )
    assert found <= 2 / sharpness < found * 2 ** (1 / 16) * (1 + 1e-9)


def test_warmup_starts_at_the_peak_when_the_peak_is_stable() -> None:
    assert critical_rate(lambda lr: 1.0 - lr, 1.0, peak_lr=0.5) == 0.5


@pytest.mark.parametrize("after", [2.0, math.inf, math.nan])
def test_warmup_starts_at_zero_when_no_rate_is_stable(after: float) -> None:
    assert critical_rate(lambda _: after, 1.0, peak_lr=0.5) == 0.0
