"""Small corpora and data sets for the tests of data_pipeline, and a reader that shares no code with it."""

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpus import packaged_corpus
from data_pipeline.dataset.manifest import Manifest
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare


def packaged_texts() -> list[str]:
    """The chapters of the packaged corpus."""
    with gzip.open(packaged_corpus(), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def json_lines(*texts: object) -> bytes:
    """A JSON line {"text": …} for each text."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_jsonl(path: Path, texts: Sequence[object]) -> Path:
    """A file of a JSON line {"text": …} for each text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines(*texts))
    return path


def config(out: Path, *sources: Path, **settings: Any) -> DataPrepConfig:
    """A config with the packaged encoding and one process, unless `settings` change that."""
    names = tuple(str(source) for source in sources)
    return DataPrepConfig(
        **{"sources": names, "tokenizer": "outlast-4k", "out": out, "workers": 1, **settings}
    )


def prepared(out: Path, texts: Sequence[str], **settings: Any) -> Manifest:
    """Prepares a data set of `texts` in `out`."""
    return prepare(config(out, write_jsonl(out.parent / f"{out.name}.jsonl", texts), **settings))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file of a data directory, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def documents_of(folder: Path, split: str) -> list[NDArray[np.int64]]:
    """The token ids of each document, read according to the documentation of Megatron's format."""
    documents = []
    for index in sorted(folder.glob(f"{split}-*.idx")):
        raw = index.read_bytes()
        magic, version, code, sequences, boundaries = struct.unpack("<9sQBQQ", raw[:34])
        assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
        lengths = np.frombuffer(raw, "<i4", sequences, 34)
        offsets = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
        first = np.frombuffer(raw, "<i8", boundaries, 34 + 12 * sequences)
        assert first.tolist() == list(range(sequences + 1))
        dtype = np.dtype({4: "<i4", 8: "<u2"}[code])
        data = index.with_suffix(".bin").read_bytes()
        for length, offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
            documents.append(np.frombuffer(data, dtype, length, offset).astype(np.int64))
    return documents
