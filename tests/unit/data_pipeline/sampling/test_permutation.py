import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sampling.permutation import Permutation

PRIMES = [2, 3, 5, 7, 11, 101, 997, 7919]
NEAR_POWERS_OF_TWO = [2**k + d for k in range(1, 14) for d in (-1, 0, 1)]


@pytest.mark.parametrize("size", sorted({1, *PRIMES, *NEAR_POWERS_OF_TWO}))
def test_every_number_occurs_exactly_once(size: int) -> None:
    order = Permutation(size, "1/0/0")(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(1, 3000), key=st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_every_number_occurs_exactly_once_for_any_size_and_key(size: int, key: str) -> None:
    order = Permutation(size, key)(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), data=st.data())
@settings(max_examples=100, deadline=None)
def test_lookups_in_huge_permutations_are_in_range_and_distinct(size: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    numbers = Permutation(size, "k")(np.array(positions, dtype=np.int64))
    assert ((numbers >= 0) & (numbers < size)).all()
    assert len(set(numbers.tolist())) == len(positions)


def test_a_lookup_gives_the_same_number_alone_and_among_others() -> None:
    permutation = Permutation(1000, "seed")
    together = permutation(np.arange(1000))
    alone = [int(permutation(np.array([position]))[0]) for position in range(1000)]
    assert together.tolist() == alone


def test_all_orders_of_four_occur_about_equally_often() -> None:
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    trials = 6000
    for key in range(trials):
        counts[tuple(Permutation(4, f"{key}")(np.arange(4)).tolist())] += 1
    # Two bits are the worst case of the network. The expected count is 250 with a standard deviation of 15.5.
    assert min(counts.values()) > 170
    assert max(counts.values()) < 330


def test_neighbouring_positions_give_uncorrelated_numbers() -> None:
    size = 100_000
    order = Permutation(size, "7/0/0")(np.arange(size))
    # The distance of two independent uniform numbers is size/3 on average; its mean over 1e5 pairs
    # has a standard deviation of 0.24/sqrt(1e5) = 0.075% of size.
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.005
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02


def test_the_order_is_the_same_in_every_version() -> None:
    # Runs in progress depend on these numbers: they may only change with a new format of the data order.
    assert Permutation(10, "1234/0/0")(np.arange(10)).tolist() == [7, 2, 8, 0, 3, 4, 5, 9, 1, 6]
    assert Permutation(10**12, "1234/0/0")(np.arange(3)).tolist() == [
        461638231812,
        438453694078,
        495469010599,
    ]


def test_positions_out_of_range_are_refused() -> None:
    permutation = Permutation(10, "k")
    for outside in (-1, 10):
        with pytest.raises(IndexError, match=r"positions outside \[0, 10\)"):
            permutation(np.array([outside]))
    with pytest.raises(ValueError, match="a permutation of 0 numbers"):
        Permutation(0, "k")
