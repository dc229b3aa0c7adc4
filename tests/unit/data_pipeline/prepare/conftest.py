"""The inputs that the tests of preparing share."""

import gzip
import json
from pathlib import Path

import pytest

from tests.unit.data_pipeline.support import packaged_texts, write_jsonl


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of several kinds; some of their documents are empty."""
    folder = tmp_path_factory.mktemp("raw")
    texts = packaged_texts()
    write_jsonl(folder / "a.jsonl", [*texts[:200], "", *texts[200:400]])
    write_jsonl(folder / "sub" / "b.jsonl", texts[400:420])
    (folder / "c.txt").write_text(texts[500])
    (folder / "d.txt").touch()
    packed = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts[600:700])
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(packed))
    return folder
