"""The packaged corpus. README.md states its source and status."""

from importlib import resources
from pathlib import Path


def packaged_corpus() -> Path:
    """The path of the packaged corpus, a .jsonl.gz file with one chapter per line."""
    return Path(str(resources.files("data_pipeline.corpus") / "kjv.jsonl.gz"))
