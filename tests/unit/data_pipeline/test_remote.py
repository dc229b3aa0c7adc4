"""Sources in object stores on this machine: a real S3 server, and fakes of the hub and of Google's store."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import remote
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.sources.documents import DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.spans import Span
from tests.unit.data_pipeline.support import config, files_of, packaged_texts
from tests.unit.s3_support import s3_bucket
from tests.unit.store_support import google_storage, hub

TEXTS = packaged_texts()[:90]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of texts as lines, compressed lines, a table and a text file."""
    with s3_bucket("corpus") as made:
        for name, content in contents().items():
            made.put_object(Key=f"raw/{name}", Body=content)
        made.put_object(Key="raw/.hidden/x.jsonl", Body=b"{}")
        made.put_object(Key="raw/notes.pdf", Body=b"%PDF")
        yield made


def contents() -> dict[str, bytes]:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[60:], "n": range(30)}), table, row_group_size=7)
    return {
        "a.jsonl": b"".join(lines[:30]),
        "b/c.jsonl.gz": gzip.compress(b"".join(lines[30:40])),
        "b/d.jsonl.zst": zstandard.compress(b"".join(lines[40:60])),
        "e.parquet": table.getvalue().to_pybytes(),
        "f.txt": b"one document\nof two lines",
    }


def local_copy(folder: Path) -> Path:
    for name, content in contents().items():
        path = folder / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "raw"


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_gives_the_same_shards_as_its_local_copy(tmp_path: Path, workers: int) -> None:
    settings = {"shard_tokens": 5000, "workers": workers}
    here = prepare(config(tmp_path / "here", local_copy(tmp_path), **settings))
    there = prepare(config(tmp_path / "there", **settings, sources=("s3://corpus/raw",)))
    assert there.documents == here.documents == 91
    assert there.fingerprint == here.fingerprint
    shards = [
        {name: content for name, content in files_of(tmp_path / folder).items() if name != "manifest.json"}
        for folder in ("here", "there")
    ]
    assert shards[0] == shards[1]
    names = [source["name"] for source in there.sources]
    assert names == [source["name"] for source in here.sources] == [f"raw/{name}" for name in contents()]
    assert prepare(config(tmp_path / "there", **settings, sources=("s3://corpus/raw",))) == there


@pytest.mark.usefixtures("bucket")
def test_files_of_a_bucket_have_the_same_names_as_local_ones(tmp_path: Path) -> None:
    raw = local_copy(tmp_path)
    for end in ("", "/b", "/*.jsonl", "/*/*.jsonl.*", "/**/*.jsonl*", "/a.jsonl"):
        here, ignored_here = find_files([f"{raw}{end}"])
        there, ignored = find_files([f"s3://corpus/raw{end}"])
        assert [(f.name, f.size_bytes) for f in there] == [(f.name, f.size_bytes) for f in here], end
        assert len(ignored) == len(ignored_here) + (end == "")  # only the bucket contains the .pdf
    assert {file.location.partition("://")[0] for file in there} == {"s3"}


@pytest.mark.usefixtures("bucket")
def test_a_source_that_cannot_be_listed_is_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "gs", raising=False)
    urls = ["s3://corpus/missing.jsonl", "s3://corpus/raw/notes.pdf", "s3://none/x.jsonl", "gs://b/x.jsonl"]
    with pytest.raises(ConfigError) as error:
        find_files([*urls, "nosuch://x/a.jsonl"])
    missing, other, no_bucket, no_package, unknown = error.value.problems
    assert missing.startswith("s3://corpus/missing.jsonl: no such file or folder (supported: .jsonl")
    assert other.startswith("s3://corpus/raw/notes.pdf: none of the 1 files there is supported (supported:")
    assert no_bucket.startswith("s3://none/x.jsonl: no such file or folder")
    assert no_package.endswith("To read gs://, pip install 'outlast[gs]'")
    assert unknown.startswith("nosuch://x/a.jsonl: ValueError Protocol not known: nosuch")


def test_an_object_replaced_after_it_was_listed_is_refused(bucket: Any) -> None:
    bucket.put_object(Key="other/a.jsonl", Body=b'{"text": "before"}\n')
    (file,), _ = find_files(["s3://corpus/other"])
    span = Span(file, 0, file.size_bytes)
    assert list(DocumentReader(span, "text")) == [b"before"]
    bucket.put_object(Key="other/a.jsonl", Body=b'{"text": "after!"}\n')
    with pytest.raises(DataError, match=r"^s3://corpus/other/a\.jsonl: it has changed since it was listed"):
        list(DocumentReader(span, "text"))


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("name", ["a.jsonl", "e.parquet"])
def test_a_failing_store_is_an_error_and_not_a_broken_document(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (file,), _ = find_files([f"s3://corpus/raw/{name}"])
    import s3fs

    def fail(*_: object) -> bytes:
        raise ConnectionError("connection lost")

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", fail)
    with pytest.raises(DataError, match=f"{name}: reading failed: ConnectionError connection lost. Finished"):
        list(DocumentReader(Span(file, 0, file.size_bytes), "text"))


def test_reading_a_span_fetches_little_more_than_the_span(
    monkeypatch: pytest.MonkeyPatch, bucket: Any
) -> None:
    """A worker that reads a part of a large object fetches nothing before it and little after it."""
    import s3fs

    fetched = 0
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        nonlocal fetched
        content: bytes = fetch(self, start, end)
        fetched += len(content)
        return content

    line = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    bucket.put_object(Key="large/a.jsonl", Body=line * 3000)  # 30 MB
    (file,), _ = find_files(["s3://corpus/large"])
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    documents = list(DocumentReader(Span(file, 20_000_000, 24_000_000), "text"))
    assert abs(len(documents) - 4_000_000 / len(line)) < 2
    assert fetched < 4_000_000 + 2 * remote.REQUEST_BYTES


@pytest.mark.parametrize(
    ("store", "name", "source"),
    [
        (hub, "user/texts", "hf://datasets/user/texts"),
        (google_storage, "texts", "gs://texts"),
    ],
)
def test_files_of_other_stores_give_the_same_shards_as_local_copies(
    tmp_path: Path, store: Callable[..., AbstractContextManager[list[str]]], name: str, source: str
) -> None:
    settings = {"shard_tokens": 5000}
    here = prepare(config(tmp_path / "here", local_copy(tmp_path), **settings))
    files = {f"raw/{file}": content for file, content in contents().items()}
    with store(name, {**files, "README.md": b"# texts"}) as fetched:
        there = prepare(config(tmp_path / "there", **settings, sources=(f"{source}/raw",)))
        assert there.documents == here.documents == 91
        assert there.fingerprint == here.fingerprint
        assert [of["name"] for of in there.sources] == list(files)
        assert set(fetched) == set(files)
        before = len(fetched)
        assert prepare(config(tmp_path / "there", **settings, sources=(f"{source}/raw",))) == there
        assert len(fetched) == before
        found, _ = find_files([f"{source}/raw/**/*.jsonl*"])
        assert [file.name for file in found] == ["a.jsonl", "b/c.jsonl.gz", "b/d.jsonl.zst"]
        with pytest.raises(ConfigError, match=r"nothing/a\.jsonl: "):
            find_files([f"{source}-nothing/a.jsonl"])


def test_a_file_of_the_hub_replaced_after_it_was_listed_is_refused() -> None:
    files = {"a.jsonl": b'{"text": "before"}\n'}
    with hub("user/texts", files):
        (file,), _ = find_files(["hf://datasets/user/texts/a.jsonl"])
        span = Span(file, 0, file.size_bytes)
        assert list(DocumentReader(span, "text")) == [b"before"]
        files["a.jsonl"] = b'{"text": "after!"}\n'
        with pytest.raises(DataError, match=r"texts/a\.jsonl: it has changed since it was listed"):
            list(DocumentReader(span, "text"))
