"""hpZ of ZeRO++, which keeps another copy of the weights among fewer processes, changes no number."""

from collections.abc import Callable

from tests.distributed.conftest import Run, same_state


def test_a_run_with_secondary_shards_has_the_numbers_of_one_without(new_run: Callable[..., Run]) -> None:
    """The search for the start of the warmup replaces the weights, and must also replace their copies."""
    runs = [
        new_run(
            zero__stage=3,
            zero__secondary_shards=shards,
            schedule__total_steps=3,
            schedule__warmup="auto",
            launch__node_check=False,
        )
        for shards in (1, 2)
    ]
    for run in runs:
        assert run.train(2)["exit_code"] == 0
    assert runs[0].losses() == runs[1].losses()
    assert same_state(runs[0].state(3), runs[1].state(3))
