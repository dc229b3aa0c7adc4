"""Two data sets for the tests of reading."""

from pathlib import Path

import pytest

from tests.unit.data_pipeline.support import packaged_texts, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many short documents in several small shards, so that windows cross the borders of both."""
    verses = [verse for chapter in packaged_texts()[:30] for verse in chapter.split("\n")]
    out = tmp_path_factory.mktemp("batches") / "data"
    manifest = prepared(out, verses, val_fraction=0.2, shard_tokens=3000)
    assert len(manifest.train) > 5
    assert len(manifest.val) > 2
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batches") / "other"
    prepared(out, packaged_texts()[100:110], val_fraction=0.0)
    return out
