"""Which documents a data set holds out for validation."""

import xxhash


def is_held_out(text: bytes, val_fraction: float, seed: int) -> bool:
    """Whether the document belongs to the validation split.

    Decided by the document's own hash, so that the split is stable when the corpus grows, and a smaller
    fraction is part of a larger one.
    """
    return xxhash.xxh3_64_intdigest(text, seed) < val_fraction * 2.0**64
