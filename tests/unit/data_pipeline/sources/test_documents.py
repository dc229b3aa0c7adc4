import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.corpus import packaged_corpus
from data_pipeline.sources import documents
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.spans import Span
from tests.unit.data_pipeline.support import json_lines


def _read(path: Path, text_field: str = "text") -> list[bytes | BadDocument]:
    (file,), _ = find_files([path])
    return list(DocumentReader(Span(file, 0, file.size_bytes), text_field))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_lines_are_read_in_order_from_each_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](json_lines("one", "zwei", "三", "")))
    assert _read(path) == [b"one", b"zwei", "三".encode(), b""]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_blank_lines_are_empty_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"\xef\xbb\xbf\n \t\x0b\x0c\r\n\n  "))
    assert _read(path) == [b""] * 4
    path.write_bytes(COMPRESSIONS[suffix](b"\xef\xbb\xbf"))
    assert _read(path) == [b""]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"\xef\xbb\xbftwo\nlines\n"))
    assert _read(path) == [b"two\nlines\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        COMPRESSIONS[suffix](json_lines("a" * 3_000_000)) + COMPRESSIONS[suffix](json_lines("b"))
    )
    assert _read(path) == [b"a" * 3_000_000, b"b"]


@pytest.mark.parametrize(
    ("suffix", "reason"), [(".gz", "gzip data end too early"), (".zst", "zstd data end too")]
)
def test_a_truncated_compressed_file_is_a_broken_document(tmp_path: Path, suffix: str, reason: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](json_lines("first", "second"))[:-6])
    *_, last = _read(path)
    assert isinstance(last, BadDocument)
    assert reason in last.reason


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_data_is_a_broken_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"this is not compressed at all")
    ((line, reason, *_),) = _read(path)
    assert line == 1
    assert reason.startswith(f"damaged {'gzip' if suffix == '.gz' else 'zstd'} data")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter"),
        (b"[" * 100_000, "JSON that is nested too deeply to be read"),
        (b'"text"', "not a JSON object"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": ["a"]}', "'text' is list, not a string"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (rb'{"text": "\ud83d"}', "'text' holds half of a surrogate pair, which is not Unicode text"),
    ],
)
def test_a_broken_line_is_reported_with_its_number_and_reason(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines("before") + line + b"\n" + json_lines("after"))
    before, bad, after = _read(path)
    assert (before, after) == (b"before", b"after")
    assert isinstance(bad, BadDocument)
    assert (bad.line, bad.reason) == (2, reason)


def test_a_text_file_that_is_not_utf8_is_reported_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nG\xf6del\n")
    assert _read(path) == [BadDocument(3, "not valid UTF-8", 2)]


def test_parquet_columns_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {n}" for n in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(3000), "body": texts}), path, row_group_size=700)
    assert _read(path, "body") == [text.encode() for text in texts]


def test_problems_of_a_parquet_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), path)
    assert _read(path) == [b"a", BadDocument(2, "'text' is null"), b"c"]
    assert _read(path, "n")[0] == BadDocument(1, "'n' is int, not a string")
    assert _read(path, "body") == [BadDocument(1, "no column 'body'; it has text, n", lost=3)]
    path.write_bytes(b"PAR1 or not")
    ((line, reason, *_),) = _read(path)
    assert line == 1
    assert reason.startswith("not a readable Parquet file")


def test_the_packaged_corpus_is_complete() -> None:
    chapters = _read(packaged_corpus())
    assert len(chapters) == 1189
    assert sum(chapter.count(b"\n") + 1 for chapter in chapters if isinstance(chapter, bytes)) == 31102


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_too_large_for_one_document_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT_BYTES", 1000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"x" * 1000))
    assert _read(path) == [b"x" * 1000]
    path.write_bytes(COMPRESSIONS[suffix](b"x" * 1001))
    ((line, reason, *_),) = _read(path)
    assert line == 1
    assert reason.startswith("a text file is one document, and this one has more than 1 GiB")
