from data_pipeline.sources.held_out import is_held_out


def test_a_smaller_fraction_holds_out_a_subset_of_a_larger_one() -> None:
    texts = [f"document {n}".encode() for n in range(20_000)]
    small = {text for text in texts if is_held_out(text, 0.01, seed=0)}
    large = {text for text in texts if is_held_out(text, 0.1, seed=0)}
    assert small < large
    assert 0.009 < len(large) / len(texts) / 10 < 0.011
    assert not any(is_held_out(text, 0.0, seed=0) for text in texts)
    assert large != {text for text in texts if is_held_out(text, 0.1, seed=1)}
