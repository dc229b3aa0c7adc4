import itertools

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sampling.batch_schedule import BatchSizes


@given(
    final=st.integers(1, 6),
    warmup=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), max_size=4),
)
def test_a_schedule_agrees_with_adding_up_its_sizes(final: int, warmup: list[tuple[int, int]]) -> None:
    listed = [size for steps, size in warmup for _ in range(steps)] + [final] * 30
    consumed = [0, *itertools.accumulate(listed)]
    sizes = BatchSizes(final, warmup)
    assert [sizes.at(step) for step in range(1, len(listed) + 1)] == listed
    assert [sizes.until(step) for step in range(len(consumed))] == consumed
    for amount in range(consumed[-1]):
        assert sizes.steps_for(amount) == next(step for step, used in enumerate(consumed) if used >= amount)
    doubled = BatchSizes(2 * final, [(steps, 2 * size) for steps, size in warmup]).over(2)
    assert [doubled.until(step) for step in range(len(consumed))] == consumed
