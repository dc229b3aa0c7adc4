import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus import packaged_corpus
from data_pipeline.errors import ConfigError
from data_pipeline.sources import documents
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.sources.spans import Span, locate_line


def _read(path: Path, text_field: str = "text") -> list[bytes | BadDocument]:
    (file,), _ = find_files([path])
    return list(DocumentReader(Span(file, 0, file.size_bytes), text_field))


def _lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_lines_come_in_order_from_each_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](_lines("one", "zwei", "三", "")))
    assert _read(path) == [b"one", b"zwei", "三".encode(), b""]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_file_of_lines_with_nothing_in_them_has_empty_documents(tmp_path: Path, suffix: str) -> None:
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
def test_a_compressed_file_of_several_members_is_read_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](_lines("a" * 3_000_000)) + COMPRESSIONS[suffix](_lines("b")))
    assert _read(path) == [b"a" * 3_000_000, b"b"]


@pytest.mark.parametrize(
    ("suffix", "reason"), [(".gz", "gzip data end too early"), (".zst", "zstd data end too")]
)
def test_a_compressed_file_that_was_cut_short_is_named_broken(
    tmp_path: Path, suffix: str, reason: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](_lines("first", "second"))[:-6])
    *_, last = _read(path)
    assert isinstance(last, BadDocument)
    assert reason in last.reason


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_data_are_named_broken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"this is not compressed at all")
    ((line, reason),) = _read(path)
    assert line == 1
    assert reason.startswith(f"damaged {'gzip' if suffix == '.gz' else 'zstd'} data")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"text"', "not a JSON object"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": ["a"]}', "'text' is list, not a string"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (rb'{"text": "\ud83d"}', "'text' holds half of a surrogate pair, which is not Unicode text"),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines("before") + line + b"\n" + _lines("after"))
    assert _read(path) == [b"before", BadDocument(2, reason), b"after"]


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nG\xf6del\n")
    assert _read(path) == [BadDocument(3, "not valid UTF-8")]


def test_parquet_columns_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {n}" for n in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(3000), "body": texts}), path, row_group_size=700)
    assert _read(path, "body") == [text.encode() for text in texts]


def test_what_is_wrong_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), path)
    assert _read(path) == [b"a", BadDocument(2, "'text' is null"), b"c"]
    assert _read(path, "n")[0] == BadDocument(1, "'n' is int, not a string")
    assert _read(path, "body") == [BadDocument(1, "no column 'body'; it has text, n")]
    path.write_bytes(b"PAR1 or not")
    ((line, reason),) = _read(path)
    assert line == 1
    assert reason.startswith("not a readable Parquet file")


@given(
    lines=st.lists(st.text(alphabet="ab\n\r é", max_size=12), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    ends_with_newline=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_spans_of_a_file_give_each_line_once_and_know_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int], ends_with_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    raw = _lines(*lines)
    path.write_bytes(raw if ends_with_newline else raw[:-1])
    (file,), _ = find_files([path])
    edges = sorted({0, file.size_bytes, *(cut for cut in cuts if cut < file.size_bytes)})
    found: list[bytes | BadDocument] = []
    for start, stop in itertools.pairwise(edges):
        span = Span(file, start, stop)
        reader = DocumentReader(span, "text")
        for document in reader:
            found.append(document)
            assert locate_line(span, reader.line) == f"{path}:{len(found)}"
    assert found == [line.encode() for line in lines]


def test_the_held_out_documents_of_a_smaller_fraction_are_among_those_of_a_larger() -> None:
    texts = [f"document {n}".encode() for n in range(20_000)]
    small = {text for text in texts if is_held_out(text, 0.01, seed=0)}
    large = {text for text in texts if is_held_out(text, 0.1, seed=0)}
    assert small < large
    assert 0.009 < len(large) / len(texts) / 10 < 0.011
    assert not any(is_held_out(text, 0.0, seed=0) for text in texts)
    assert large != {text for text in texts if is_held_out(text, 0.1, seed=1)}


def test_the_packaged_corpus_is_whole() -> None:
    chapters = _read(packaged_corpus())
    assert len(chapters) == 1189
    assert sum(chapter.count(b"\n") + 1 for chapter in chapters if isinstance(chapter, bytes)) == 31102


def test_folders_and_globs_are_searched_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a/3.jsonl.gz", "b/.hidden.txt", "b/.git/x.txt", "b/notes.pdf"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files, ignored = find_files([tmp_path / "raw"])
    assert [file.name for file in files] == ["raw/a/3.jsonl.gz", "raw/b/1.txt", "raw/b/2.jsonl"]
    assert ignored == 1
    files, ignored = find_files([str(tmp_path / "raw/*/*.jsonl*")])
    assert [file.name for file in files] == ["a/3.jsonl.gz", "b/2.jsonl"]
    assert ignored == 0


def test_every_source_that_names_nothing_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    sources = ["missing.jsonl", "notes.pdf", "empty", "*.parquet", "a.txt", "./a.txt"]
    with pytest.raises(ConfigError) as error:
        find_files([str(tmp_path / source) for source in sources])
    assert [problem.removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        "missing.jsonl: no such file or folder",
        "notes.pdf: not a kind of file that is read here "
        "(.jsonl, .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst, .parquet)",
        "empty: the folder holds no file that is read here "
        "(.jsonl, .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst, .parquet)",
        "*.parquet: no file matches",
        "a.txt is named by two sources; name it once",
    ]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_too_large_for_one_document_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(documents, "_LARGEST_TEXT_BYTES", 1000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"x" * 1000))
    assert _read(path) == [b"x" * 1000]
    path.write_bytes(COMPRESSIONS[suffix](b"x" * 1001))
    assert _read(path) == [BadDocument(1, "a text file is one document, and this one has more than 1 GiB")]
