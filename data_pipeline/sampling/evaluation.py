"""The beginning of the validation split, in windows, for an evaluation."""

from pathlib import Path

import numpy as np

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.dataset.token_stream import TokenStream
from data_pipeline.errors import DataError
from data_pipeline.sampling.batch import Batch, BatchBuilder


class EvaluationReader:
    """Reads the validation split in file order, in windows of `context` inputs and one more target.

    The windows cover the first `tokens` targets, or all targets of a smaller split; the attribute `tokens` is
    the number covered. The number of ranks does not matter. Raises DataError without a validation split.
    """

    def __init__(self, path: Path, *, context: int, tokens: int, document_mask: bool) -> None:
        self._stream = TokenStream(path, read_manifest(path), "val")
        if self._stream.tokens < 2:
            raise DataError(
                f"{path} has no validation split; prepare it with a val_fraction above 0 "
                f"(a small corpus needs a larger one)"
            )
        self.tokens = min(tokens, self._stream.tokens - 1)
        self._context = context
        self._document_mask = document_mask

    def __len__(self) -> int:
        """The number of windows."""
        return -(-self.tokens // self._context)

    def windows(self, first: int, count: int) -> Batch:
        """The windows [first, first + count), each [T + 1].

        Everything after the last evaluated token is padding with id 0 and is not scored. That includes whole
        windows past the end.
        """
        batch = BatchBuilder(count, self._context, self._document_mask)
        for row in range(count):
            start = (first + row) * self._context
            batch.fill(row, self._stream, start, targets=min(self._context, max(0, self.tokens - start)))
        return batch.finish(np.arange(first, first + count, dtype=np.int64))
