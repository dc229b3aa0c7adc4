"""Decides which documents are held out for validation."""

import xxhash


def is_held_out(text: bytes, val_fraction: float, seed: int) -> bool:
    """Whether the document `text` belongs to the validation split.

    The document's own hash decides. So a document keeps its split when the corpus grows, and a smaller
    `val_fraction` holds out a subset of what a larger one holds out.
    """
    return xxhash.xxh3_64_intdigest(text, seed) < val_fraction * 2.0**64
