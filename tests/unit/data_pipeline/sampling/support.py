"""Helpers of the tests of reading."""

from data_pipeline.sampling.batch import Batch

CONTEXT = 64


def segments(batch: Batch) -> list[list[int]]:
    """The segment ends of each row, relative to the row."""
    rows, context = batch.scored.shape
    ends = batch.document_ends.tolist()
    return [
        [end - row * context for end in ends if row * context < end <= (row + 1) * context]
        for row in range(rows)
    ]
