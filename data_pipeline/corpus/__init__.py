"""The packaged corpus: README.md here states its source and status."""

from importlib import resources
from pathlib import Path


def packaged_corpus() -> Path:
    """The corpus that ships with the project, a .jsonl.gz; its README.md states source and status."""
    return Path(str(resources.files("data_pipeline.corpus") / "kjv.jsonl.gz"))
