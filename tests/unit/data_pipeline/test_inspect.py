import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
from click.testing import CliRunner

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.inspect import length_histogram, sample_documents
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tokenizer.encoding import load_encoding
from launcher.cli import commands
from tests.unit.data_pipeline.support import config, documents_of, write_jsonl


def test_lengths_and_sampled_documents_are_those_of_the_files(made: Path) -> None:
    manifest = read_manifest(made)
    documents = documents_of(made, "train")
    found = length_histogram(made, manifest, "train")
    assert found.longest == max(map(len, documents))
    assert found.empty == 0
    for power, count in enumerate(found.counts):
        assert count == sum(2**power <= len(document) < 2 ** (power + 1) for document in documents)
    assert sum(found.counts) == len(documents)
    encoding = load_encoding(made)
    shown = list(sample_documents(made, manifest, "train", encoding, 10))
    assert len({name for name, _, _ in shown}) == 10
    before = {
        shard.name: sum(s.documents for s in manifest.train[:n]) for n, shard in enumerate(manifest.train)
    }
    for name, tokens, text in shown:
        shard, _, number = name.partition(":")
        document = documents[before[shard] + int(number)]
        assert len(document) == tokens
        assert encoding.decode(document.tolist()) == text
    everything = list(sample_documents(made, manifest, "train", encoding, 10**6))
    assert len(everything) == len(documents)
    assert list(sample_documents(made, manifest, "val", encoding, 0)) == []


def test_the_inspect_command_prints_counts_a_histogram_and_text(made: Path) -> None:
    done = CliRunner().invoke(commands, ["data", "inspect", str(made)], standalone_mode=False)
    assert done.exception is None
    manifest = read_manifest(made)
    assert f"{manifest.train_tokens:,}" in done.output
    assert "tokenizer outlast-4k with 4,096 ids, stored as uint16" in done.output
    assert "512 – 1,023" in done.output
    assert done.output.count("── train-") == 3


def test_the_inspect_command_names_a_few_sources(tmp_path: Path) -> None:
    for number in range(120):
        write_jsonl(tmp_path / "raw" / f"{number:03}.jsonl", ["some text"])
    prepare(config(tmp_path / "data", tmp_path / "raw", val_fraction=0))
    done = CliRunner().invoke(commands, ["data", "inspect", str(tmp_path / "data")], standalone_mode=False)
    assert done.exception is None
    assert done.output.count(".jsonl") == 5
    assert "120 sources of 2,640 bytes: raw/000.jsonl, raw/001.jsonl" in done.output
    assert "and 115 more (see manifest.json)" in done.output


def test_files_that_were_read_in_part_are_not_counted_as_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-8] + bytes(8))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"] * 1000}), tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", ["some text"])
    arguments = ["prepare", str(tmp_path), "--tokenizer", "outlast-4k", "--out", str(tmp_path.parent / "d")]
    arguments += ["--set", "on_bad=skip", "--workers", "1"]
    done = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert done.exception is None
    assert "1 files were read in part or not at all: damaged gzip data" in done.stderr
    assert "1,000 documents were left out: no column 'text'; it has body" in done.stderr
