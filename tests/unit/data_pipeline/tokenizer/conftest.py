"""The packaged encoding, for the tests of everything that uses one."""

import pytest

from data_pipeline.tokenizer.encoding import Encoding, load_encoding


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return load_encoding("outlast-4k")
