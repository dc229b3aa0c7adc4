"""A data set that the tests of its files damage."""

import shutil
from pathlib import Path

import pytest

from tests.unit.data_pipeline.support import packaged_texts, prepared


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "data"
    prepared(out, packaged_texts()[:40], val_fraction=0.3)
    return out


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))
