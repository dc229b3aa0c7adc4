"""Hugging Face data sets as sources: the real package `datasets` reads local folders."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config_file import validate
from data_pipeline.dataset.integrity import verify
from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.sources.hub import HubDataset, open_dataset
from data_pipeline.tokenizer.encoding import load_encoding
from tests.unit.data_pipeline.support import documents_of, files_of, packaged_texts, write_jsonl

TEXTS = packaged_texts()[:90]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of thirty documents, which `datasets` calls three shards."""
    folder = tmp_path_factory.mktemp("hub") / "texts"
    folder.mkdir()
    for number in range(3):
        column = pyarrow.array(TEXTS[30 * number : 30 * number + 30])
        table = pyarrow.table({"body": column, "n": list(range(30))})
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet")
    return folder


def _config(out: Path, *tables: dict[str, Any], **settings: Any) -> DataPrepConfig:
    written = {"tokenizer": "outlast-4k", "out": out, "val_fraction": 0, "shard_tokens": 5000, "workers": 1}
    return validate(DataPrepConfig, {**written, "datasets": list(tables), **settings}, "DATA.toml")


def _texts(out: Path) -> list[str]:
    encoding = load_encoding(out)
    return [encoding.decode(ids[:-1].tolist()) for ids in documents_of(out, "train")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_in_order_by_any_number_of_workers(
    folder: Path, tmp_path: Path, streaming: bool
) -> None:
    table = {"name": str(folder), "text_field": "body", "streaming": streaming}
    manifest = prepare(_config(tmp_path / "one", table))
    assert _texts(tmp_path / "one") == TEXTS
    assert list(verify(tmp_path / "one")) == []
    (source,) = manifest.sources
    assert source["unit"] == ("shards" if streaming else "rows")
    assert source["ranges"][0]["start"] == 0
    assert source["ranges"][-1]["stop"] == (3 if streaming else 90)
    assert len(source["ranges"]) > 2
    prepare(_config(tmp_path / "two", table, workers=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_complete_preparation_of_a_data_set_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    table = {"name": str(folder), "text_field": "body"}
    first = prepare(_config(tmp_path / "data", table))
    assert prepare(_config(tmp_path / "data", table)) == first
    with pytest.raises(ConfigError, match=r"with other settings: sources \(for example .* train"):
        prepare(_config(tmp_path / "data", {**table, "split": "train[:50%]"}))


def test_a_split_and_a_file_can_be_combined(folder: Path, tmp_path: Path) -> None:
    extra = write_jsonl(tmp_path / "a.jsonl", ["another file"])
    table = {"name": str(folder), "text_field": "body", "split": "train[10:20]"}
    prepare(_config(tmp_path / "data", table, sources=[str(extra)]))
    assert _texts(tmp_path / "data") == ["another file", *TEXTS[10:20]]


def test_a_data_set_saved_to_disk_is_read(folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.load_dataset(str(folder)).save_to_disk(tmp_path / "saved")
    prepare(_config(tmp_path / "data", {"name": str(tmp_path / "saved"), "text_field": "body"}))
    assert _texts(tmp_path / "data") == TEXTS
    with pytest.raises(ConfigError, match="no split 'test'; it has train"):
        open_dataset(HubDataset(name=str(tmp_path / "saved"), split="test"), "body")


def test_the_named_configuration_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    for name in ("one", "two"):
        write_jsonl(folder / f"{name}.jsonl", [f"this is {name}"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    prepare(_config(tmp_path / "data", {"name": str(folder), "config": "two"}))
    assert _texts(tmp_path / "data") == ["this is two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_cannot_be_loaded_is_reported_with_all_other_problems(
    folder: Path, tmp_path: Path, streaming: bool
) -> None:
    tables = [
        {"name": str(tmp_path / "none"), "streaming": streaming},
        {"name": str(folder), "split": "test", "streaming": streaming},
        {"name": str(folder), "text_field": "text", "streaming": False},
    ]
    with pytest.raises(ConfigError) as error:
        prepare(_config(tmp_path / "data", *tables, tokenizer="gpt-2"))
    tokenizer, missing, split, column = error.value.problems
    assert tokenizer.startswith("tokenizer 'gpt-2'")
    assert missing.startswith(f"datasets: {tmp_path / 'none'} train")
    assert "FileNotFoundError" in missing
    assert 'split "test"' in split or "Bad split: test" in split
    assert column.endswith("has no column 'text'; it has body, n. Set text_field to one of them")


def test_broken_rows_are_reported_by_data_set_and_row(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [{"text": "fine"}, {"text": None}, {"text": ""}, {"text": "too"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"rows train:2: 'text' is null"):
        prepare(_config(tmp_path / "data", {"name": str(folder)}))
    with pytest.raises(DataError, match=r"rows train \(streamed\), shards 0 to 1:2: 'text' is null"):
        prepare(_config(tmp_path / "streamed", {"name": str(folder), "streaming": True}))
    manifest = prepare(_config(tmp_path / "data", {"name": str(folder)}, on_bad="skip"))
    assert manifest.skipped == {"'text' is null": 1, "empty": 1}
    assert read_manifest(tmp_path / "data").documents == 2


def test_the_error_of_a_broken_stream_says_where_it_broke_and_how_to_continue(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "stream").mkdir()
    for file in folder.iterdir():
        (tmp_path / "stream" / file.name).write_bytes(file.read_bytes())
    source = open_dataset(
        HubDataset(name=str(tmp_path / "stream"), text_field="body", streaming=True), "text"
    )
    assert (source.units, source.unit) == (3, "shards")
    (tmp_path / "stream" / "train-1.parquet").unlink()
    from data_pipeline.sources.documents import DocumentReader
    from data_pipeline.sources.spans import Span

    assert len(list(DocumentReader(Span(source, 0, 1), "text"))) == 30
    with pytest.raises(DataError, match=r"reading shards 1 to 2 failed: .* run again to continue"):
        list(DocumentReader(Span(source, 1, 2), "text"))


def test_nothing_to_prepare_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing to prepare: give sources .* or \[\[datasets\]\]"):
        _config(Path("data"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set without splits, and one with the splits train and test."""
    import datasets

    out = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"body": TEXTS})
    rows.save_to_disk(out / "rows")
    datasets.DatasetDict({"train": rows.select(range(80)), "test": rows.select(range(80, 90))}).save_to_disk(
        out / "splits"
    )
    rows.select([]).save_to_disk(out / "empty")
    return out


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("rows", "train[:10]", range(10)),
        ("rows", "train[:10%]", range(9)),
        ("rows", "train[90%:]", range(81, 90)),
        ("splits", "test", range(80, 90)),
        ("splits", "train[-2:]+test[:1]", range(78, 81)),
    ],
)
def test_the_split_of_a_saved_data_set_is_honoured(
    saved: Path, tmp_path: Path, name: str, split: str, rows: range
) -> None:
    prepare(_config(tmp_path / "data", {"name": str(saved / name), "split": split, "text_field": "body"}))
    assert _texts(tmp_path / "data") == [TEXTS[row] for row in rows]


@pytest.mark.parametrize(
    ("name", "table", "reason"),
    [
        ("rows", {"split": "test"}, "no split 'test'; it has train"),
        ("splits", {"split": "val[:10%]"}, "no split 'val'; it has train, test"),
        ("splits", {"config": "en"}, "a folder of save_to_disk has no config; leave config = 'en' out"),
        ("splits", {"revision": "v2"}, "a folder of save_to_disk has no revision; leave revision = 'v2' out"),
        ("rows", {"streaming": True}, "a folder of save_to_disk cannot be streamed; leave streaming out"),
        ("rows", {"split": "train[:0]"}, "split 'train[:0]' has no rows"),
        ("empty", {}, "the saved data set is empty"),
    ],
)
def test_what_a_saved_data_set_does_not_have_is_refused(
    saved: Path, name: str, table: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        open_dataset(HubDataset(name=str(saved / name), **table), "body")


def test_parts_of_a_saved_data_set_have_different_identities(saved: Path) -> None:
    name = str(saved / "rows")
    sources = [
        open_dataset(HubDataset(name=name, split=split), "body")
        for split in ("train", "train[:50%]", "train[50%:]", "train[:45]")
    ]
    whole, first, second, same = (source.fingerprint for source in sources)
    assert len({whole, first, second}) == 3
    assert first == same
