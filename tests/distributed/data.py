"""A small data set for real runs, made of sixty chapters of the packaged corpus."""

import gzip
from pathlib import Path

from data_pipeline.config_file import validate
from data_pipeline.corpus import packaged_corpus
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare


def small_data_set(folder: Path) -> Path:
    source = folder.with_suffix(".jsonl")
    with gzip.open(packaged_corpus(), "rt", encoding="utf-8") as lines:
        source.write_text("".join(line for _, line in zip(range(60), lines, strict=False)), encoding="utf-8")
    tables = {"sources": [str(source)], "tokenizer": "outlast-4k", "out": str(folder), "val_fraction": 0.1}
    prepare(validate(DataPrepConfig, {**tables, "workers": 1}, "test"))
    return folder
