"""A data set that tests of several parts share."""

from pathlib import Path

import pytest

from tests.unit.data_pipeline.support import packaged_texts, prepared


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "data"
    prepared(out, packaged_texts()[:80], val_fraction=0.2, shard_tokens=20_000)
    return out
