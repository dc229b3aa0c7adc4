from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sampling.evaluation import EvaluationReader
from tests.unit.data_pipeline.sampling.support import CONTEXT, segments
from tests.unit.data_pipeline.support import documents_of


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("tokens", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT, 1000, 10**9])
def test_evaluation_covers_the_first_targets_of_the_split_once(
    data: Path, tokens: int, document_mask: bool
) -> None:
    documents = documents_of(data, "val")
    stream = np.concatenate(documents)
    first_of_document = np.cumsum([0, *map(len, documents)])[1:-1]
    reader = EvaluationReader(data, context=CONTEXT, tokens=tokens, document_mask=document_mask)
    count = min(tokens, len(stream) - 1)
    assert reader.tokens == count
    assert len(reader) == -(-count // CONTEXT)
    batch = reader.windows(0, len(reader) + 2)  # the last two windows are padding
    assert batch.tokens.shape == (len(reader) + 2, CONTEXT + 1)
    targets = batch.tokens[:, 1:].reshape(-1)
    assert np.array_equal(targets[:count], stream[1 : count + 1])
    assert np.array_equal(batch.tokens[:, :-1].reshape(-1)[:count], stream[:count])
    assert not targets[count:].any()
    unscored = first_of_document - 1 if document_mask else np.empty(0, np.int64)
    wanted = np.ones(batch.scored.size, bool)
    wanted[count:] = False
    wanted[unscored[unscored < count]] = False
    assert np.array_equal(batch.scored.reshape(-1), wanted)
    row_ends = np.arange(1, len(batch.tokens) + 1) * CONTEXT
    real_ends = first_of_document[first_of_document <= count] if document_mask else []
    assert batch.document_ends.tolist() == sorted(
        {*row_ends.tolist(), *real_ends, count} if count % CONTEXT else {*row_ends.tolist(), *real_ends}
    )
    assert list(batch.sequence_numbers) == list(range(len(batch.tokens)))


def test_an_evaluation_window_is_the_same_alone_and_among_others(data: Path) -> None:
    reader = EvaluationReader(data, context=CONTEXT, tokens=1000, document_mask=True)
    whole = reader.windows(0, len(reader))
    for window in range(len(reader)):
        one = reader.windows(window, 1)
        assert np.array_equal(one.tokens[0], whole.tokens[window])
        assert segments(one)[0] == segments(whole)[window]


def test_the_error_for_a_missing_validation_split_says_how_to_make_one(other: Path) -> None:
    with pytest.raises(DataError, match="has no validation split; prepare it with a val_fraction above 0"):
        EvaluationReader(other, context=CONTEXT, tokens=100, document_mask=True)
