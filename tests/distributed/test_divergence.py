"""A run whose gradients are never finite again ends, and can go back."""

from collections.abc import Callable
from pathlib import Path

from tests.distributed.conftest import Run

POISONED = [str(Path(__file__).with_name("poisoned.py"))]


def test_run_ends_when_no_gradient_is_finite_any_more(new_run: Callable[..., Run]) -> None:
    """Update 6 still had a finite gradient, but the checkpoint of step 6 has not."""
    saves = {"checkpoint__every_steps": 2, "checkpoint__asynchronous": False}
    run = new_run(divergence={"max_skipped_in_a_row": 3}, schedule__total_steps=40, **saves)
    assert run.train(2, program=POISONED)["exit_code"] == 93
    assert "the gradients of 3 steps in a row, 7 to 9, were not finite" in run.result()["cause"]
    assert f"outlast resume {run.dir.path} --step 4`" in run.result()["cause"]
    assert [event["step"] for event in run.events("update_skipped")] == [7, 8, 9]


def test_few_skipped_updates_do_not_end_the_run(new_run: Callable[..., Run]) -> None:
    run = new_run(divergence={"max_skipped_in_a_row": 4}, schedule__total_steps=9)
    assert run.train(1, program=POISONED)["exit_code"] == 0
    assert [event["step"] for event in run.events("update_skipped")] == [7, 8, 9]
