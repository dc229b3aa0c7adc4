import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sampling.mixture import PERIOD, Mixture


def test_each_epoch_of_a_single_source_has_another_order() -> None:
    mixture = Mixture([1000], [1.0], seed=3)
    sources, windows = mixture.locate(np.arange(3000))
    assert not sources.any()
    epochs = windows.reshape(3, 1000)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(1000))
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (epochs[1] != epochs[2]).mean() > 0.9


def test_another_seed_gives_another_order() -> None:
    windows = [Mixture([1000], [1.0], seed).locate(np.arange(1000))[1] for seed in (1, 2)]
    assert (windows[0] != windows[1]).mean() > 0.9


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    start=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_shares_in_any_10000_sequences_are_within_a_percent_of_the_weights(
    weights: list[float], start: int
) -> None:
    mixture = Mixture([10**6 + n for n in range(len(weights))], weights, seed=1)
    sources, _ = mixture.locate(np.arange(start, start + 10_000))
    shares = np.bincount(sources, minlength=len(weights)) / 10_000
    wanted = np.array(weights) / sum(weights)
    # one percent of the weight, plus the rounding to whole sequences
    assert (np.abs(shares - wanted) <= 0.01 * wanted + 5e-4).all()


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_each_source_of_a_mixture_is_read_in_whole_epochs(sizes: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.1, 10)) for _ in sizes]
    sources, windows = Mixture(sizes, weights, seed=5).locate(np.arange(2000))
    for source, size in enumerate(sizes):
        mine = windows[sources == source].tolist()
        for first in range(0, len(mine) - size + 1, size):
            assert sorted(mine[first : first + size]) == list(range(size))


def test_counts_and_length_agree_with_counting() -> None:
    mixture = Mixture([700, 90_000], [1.0, 3.0], seed=1)
    stop = PERIOD + 12_345
    sources, _ = mixture.locate(np.arange(stop))
    assert mixture.counts(stop) == np.bincount(sources).tolist()
    length, source = mixture.length(max_epochs=2)
    assert source == 0
    assert mixture.counts(length)[0] == 1400
    assert mixture.counts(length + 1)[0] == 1401


def test_a_source_with_a_tiny_weight_has_at_least_one_turn() -> None:
    mixture = Mixture([10, 10], [1e-9, 1.0], seed=0)
    assert mixture.counts(PERIOD) == [1, PERIOD - 1]


@pytest.mark.parametrize(("sizes", "weights"), [([0], [1.0]), ([1], [0.0]), ([1, 2], [1.0])])
def test_a_mixture_without_windows_or_weights_is_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="a mixture of"):
        Mixture(sizes, weights, seed=0)


@given(data=st.data(), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_stages_and_caps_agree_with_counting_one_sequence_at_a_time(
    data: st.DataObject, sizes: list[int]
) -> None:
    """The reference takes turns and counts, without the closed forms."""
    weight = st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)).filter(any)
    first = data.draw(weight)
    later = [(n, data.draw(weight)) for n in sorted(data.draw(st.sets(st.integers(1, 300), max_size=3)))]
    caps = [data.draw(st.none() | st.floats(0.1, 3)) for _ in sizes]
    mixture = Mixture(sizes, first, 7, later=later, caps=caps)
    stop = 400 if mixture.end is None else min(400, mixture.end)
    sources, windows = mixture.locate(np.arange(stop))

    counts = [0] * len(sizes)
    quotas = [10**9 if cap is None else int(cap * size) for cap, size in zip(caps, sizes, strict=True)]
    stages = dict([(0, first), *later])
    turns, begun = np.empty(0, np.int64), 0
    for number in range(401):
        if number in stages:
            weights = stages[number]
        if number in stages or counts[turns[number - begun]] == quotas[turns[number - begun]]:
            left = [0 if counts[n] == quotas[n] else weight for n, weight in enumerate(weights)]
            if not any(left):
                assert mixture.end == number
                break
            turns, begun = Mixture([1000] * len(sizes), left, 0).locate(np.arange(401))[0], number
        assert mixture.counts(number) == counts
        if number == 400:
            break
        assert sources[number] == turns[number - begun]
        counts[sources[number]] += 1
    for source, size in enumerate(sizes):
        mine = windows[sources == source].tolist()
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size))
    reached = [
        (int(over[0]), source)
        for source, size in enumerate(sizes)
        if (over := np.flatnonzero(np.cumsum(sources == source) > size)).size
    ]
    if reached:
        assert mixture.length(1) == min(reached)


def test_shares_are_within_a_percent_of_the_weights_of_their_stage() -> None:
    mixture = Mixture([10**9] * 3, [5, 4, 1], 1, later=[(10**6, [1, 1, 8]), (2 * 10**6, [0, 1, 1])])
    for start, weights in ((0, [5, 4, 1]), (10**6, [1, 1, 8]), (2 * 10**6, [0, 1, 1])):
        for first in (start, start + 123_457, start + 10**6 - 10_000):
            sources, _ = mixture.locate(np.arange(first, first + 10_000))
            shares = np.bincount(sources, minlength=3) / 10_000
            wanted = np.array(weights) / sum(weights)
            assert (np.abs(shares - wanted) <= 0.01 * wanted + 1e-9).all(), (first, shares)


def test_a_source_stops_at_its_cap_and_the_others_take_its_share() -> None:
    small, large = 1000, 10**12
    mixture = Mixture([small, large, large], [2, 1, 1], 1, caps=[2.5, None, None])
    assert mixture.counts(4996)[0] < 2500
    assert mixture.counts(10**9)[0] == 2500
    sources, windows = mixture.locate(np.arange(20_000))
    last = int(np.flatnonzero(sources == 0)[-1])
    assert abs(last - 5000) < 5
    assert np.bincount(sources[last + 1 : last + 10_001]).tolist() == [0, 5000, 5000]
    assert len(np.unique(windows[sources == 0][:1000])) == 1000
    # the other sources continue where they were
    for source in (1, 2):
        assert len(np.unique(windows[sources == source])) == np.count_nonzero(sources == source)


def test_the_order_ends_when_every_source_has_reached_its_cap() -> None:
    mixture = Mixture([100, 300], [1, 1], 0, caps=[1, 2])
    assert mixture.end == 700
    assert mixture.counts(700) == [100, 600]


@pytest.mark.parametrize("later", [[(0, [1.0])], [(5, [0.0])], [(5, [1.0, 1.0])], [(9, [1.0]), (9, [1.0])]])
def test_invalid_stages_are_refused(later: list[tuple[int, list[float]]]) -> None:
    with pytest.raises(ValueError, match="a mixture of"):
        Mixture([10], [1.0], 0, later=later)
