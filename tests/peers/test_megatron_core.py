"""Our shards compared with megatron-core's reader and builder (`pip install --no-deps megatron-core`)."""

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import EncodingRecord, FileRecord, Manifest, Shard
from data_pipeline.dataset.megatron_index import read_header
from data_pipeline.dataset.shards import MappedShard
from data_pipeline.dataset.token_stream import TokenStream
from data_pipeline.prepare.adopt import adopt
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from tests.unit.data_pipeline.support import packaged_texts, write_jsonl

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.fixture(scope="module", params=["uint16", "int32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _encoding(dtype: str) -> Encoding:
    known = load_encoding("outlast-4k")
    if dtype == "uint16":
        return known
    return Encoding("wide", known.pattern, known.ranks, {"<|endoftext|>": 100_000})


def test_megatron_reads_every_token_and_document_of_our_shards(
    megatron: ModuleType, tmp_path: Path, dtype: str
) -> None:
    texts = packaged_texts()[:60]
    encoding = _encoding(dtype)
    (tmp_path / "encoding.json").write_bytes(encoding.to_json())
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(
        DataPrepConfig(
            sources=(str(source),),
            tokenizer=str(tmp_path / "encoding.json"),
            out=tmp_path / "data",
            val_fraction=0,
            shard_tokens=20_000,
            workers=1,
        )
    )
    assert manifest.dtype == dtype
    assert len(manifest.train) > 2
    found = []
    for shard in manifest.train:
        theirs = megatron.IndexedDataset(str(tmp_path / "data" / shard.name), multimodal=False, mmap=True)
        assert theirs.index.dtype == np.dtype(dtype)
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        assert len(theirs) == shard.documents
        assert sum(theirs.sequence_lengths.tolist()) == shard.tokens
        # copied, because its arrays point into a mapping that closes with it
        found += [np.array(theirs[index]) for index in range(len(theirs))]
    assert len(found) == len(texts)
    for ids, text in zip(found, texts, strict=True):
        assert ids.tolist() == [*encoding.encode(text).tolist(), encoding.end_of_text]


def test_our_files_equal_those_of_megatrons_builder_byte_for_byte(
    megatron: ModuleType, tmp_path: Path, dtype: str
) -> None:
    texts = packaged_texts()[:30]
    encoding = _encoding(dtype)
    (tmp_path / "encoding.json").write_bytes(encoding.to_json())
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(
        DataPrepConfig(
            sources=(str(source),),
            tokenizer=str(tmp_path / "encoding.json"),
            out=tmp_path / "data",
            val_fraction=0,
            workers=1,
        )
    )
    documents = [[[*encoding.encode(text).tolist(), encoding.end_of_text]] for text in texts]
    _build(megatron, tmp_path / "theirs", documents, dtype)
    for kind in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{kind}").read_bytes()
        assert (tmp_path / "data" / f"train-00000.{kind}").read_bytes() == theirs


def test_our_reader_reads_the_files_of_megatrons_builder(
    megatron: ModuleType, tmp_path: Path, dtype: str
) -> None:
    """Megatron's format allows documents of several sequences, and of none."""
    choose = np.random.default_rng(1)
    shards: list[list[list[list[int]]]] = [
        [
            [
                choose.integers(0, 60_000, choose.integers(1, 30)).tolist()
                for _ in range(choose.integers(0, 4))
            ]
            for _ in range(200)
        ]
        for _ in range(3)
    ]
    records = []
    for number, documents in enumerate(shards):
        prefix = tmp_path / f"train-{number:05d}"
        _build(megatron, prefix, documents, dtype)
        (tmp_path / f"{prefix.name}.sum").touch()
        sizes = {
            kind: FileRecord(Path(f"{prefix}.{kind}").stat().st_size, "0") for kind in ("bin", "idx", "sum")
        }
        tokens = sum(len(sequence) for document in documents for sequence in document)
        records.append(Shard(prefix.name, tokens, len(documents), **sizes))
        header = read_header(tmp_path / f"{prefix.name}.idx")
        assert (header.dtype, header.documents) == (dtype, 200)
        assert header.sequences == sum(map(len, documents))
        mapped = MappedShard(tmp_path, records[-1], dtype)
        assert mapped.ids.tolist() == [
            id for document in documents for sequence in document for id in sequence
        ]

    manifest = Manifest(
        dtype, EncodingRecord("none", "0", 60_000, 0, 0, "0"), tuple(records), (), {}, {}, {}, ()
    )
    stream = TokenStream(tmp_path, manifest, "train")
    documents = [document for shard in shards for document in shard]
    ids = np.array([id for document in documents for sequence in document for id in sequence])
    lengths = np.array([sum(map(len, document)) for document in documents])
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    assert stream.tokens == len(ids)
    for _ in range(200):
        first, stop = np.sort(choose.integers(0, len(ids), 2)).tolist()
        out: NDArray[np.int64] = np.empty(stop - first, dtype=np.int64)
        stream.read(first, out)
        assert np.array_equal(out, ids[first:stop])
        wanted = starts[(starts >= first) & (starts < stop)]
        assert np.array_equal(stream.document_starts(first, stop), wanted)
    everything = stream.document_starts(0, len(ids))
    assert np.array_equal(everything, starts)


def test_the_files_of_megatrons_builder_can_be_adopted(
    megatron: ModuleType, tmp_path: Path, dtype: str
) -> None:
    """Documents have several sequences or none; only the last sequence of each ends with end-of-text."""
    choose = np.random.default_rng(2)
    end = load_encoding("outlast-4k").end_of_text
    documents: list[list[list[int]]] = []
    for _ in range(100):
        sequences = [
            choose.integers(0, 4000, choose.integers(1, 30)).tolist() for _ in range(choose.integers(0, 4))
        ]
        if sequences:
            sequences[-1].append(end)
        documents.append(sequences)
    _build(megatron, tmp_path / "web_text_document", documents, dtype)
    folder, manifest = adopt([str(tmp_path / "web_text_document")], [], "outlast-4k")
    assert (folder, manifest.dtype, manifest.documents) == (tmp_path, dtype, 100)
    assert manifest.is_ended_by_token
    ids = np.array([id for document in documents for sequence in document for id in sequence])
    batch = BatchReader([(tmp_path, 1.0)], context=len(ids) - 1, global_batch=1, seed=1).batch(1, 0, 1)
    assert np.array_equal(batch.tokens[0], ids)
    ends = np.cumsum([sum(map(len, document)) for document in documents if document])
    assert batch.document_ends.tolist() == [*ends[:-1].tolist(), len(ids) - 1]


def _build(megatron: ModuleType, prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
