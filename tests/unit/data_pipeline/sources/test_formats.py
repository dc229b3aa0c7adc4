"""Each kind of file gives the same documents, whatever contains them, and no kind takes all memory."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources import documents, parsing
from data_pipeline.sources.compression import decompress
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.parsing import TOO_LARGE, split_text, split_values
from data_pipeline.sources.spans import Span
from tests.unit.data_pipeline.support import json_lines

TEXTS = ["one", 'two "quoted",\nof [two] lines {', "drei\\", "", "四 \\u0041 \\\\"]


def _read(path: Path, text_field: str = "text", separator: str | None = None) -> list[bytes | BadDocument]:
    (file,), _ = find_files([path])
    return list(DocumentReader(Span(file, 0, file.size_bytes), text_field, separator))


def _table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([n, text] for n, text in enumerate(TEXTS))])
    return out.getvalue().encode()


def _arrow(is_stream: bool) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue().to_pybytes())


def _array(indent: int | None) -> bytes:
    return json.dumps([{"id": {"a": [1, "]"]}, "text": text} for text in TEXTS], indent=indent).encode()


KINDS: dict[str, bytes] = {
    "a.jsonl": json_lines(*TEXTS),
    "b.ndjson": json_lines(*TEXTS),
    "lines.json": json_lines(*TEXTS),
    "array.json": _array(None),
    "indented.json": _array(2),
    "objects.json": b"\n".join(json.dumps({"text": text}, indent=1).encode() for text in TEXTS),
    "c.csv": _table(","),
    "d.tsv": _table("\t"),
    "file.arrow": _arrow(is_stream=False),
    "stream.arrow": _arrow(is_stream=True),
    "UPPER.JSONL": json_lines(*TEXTS),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_gives_its_documents(tmp_path: Path, name: str, compression: str) -> None:
    if compression and name.endswith(".arrow"):
        pytest.skip("compressed inside")
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSIONS[compression](KINDS[name]))
    assert _read(path) == [text.encode() for text in TEXTS]


@given(texts=st.lists(st.text(max_size=8)), indent=st.sampled_from([None, 1]), cut=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_the_values_of_an_array_are_found_wherever_blocks_end(
    texts: list[str], indent: int | None, cut: int
) -> None:
    raw = json.dumps(
        [{"text": text, "n": [{}]} for text in texts], indent=indent, ensure_ascii=False
    ).encode()
    blocks = [raw[start : start + cut] for start in range(0, len(raw), cut)]
    assert [json.loads(value)["text"] for value in split_values(blocks) if isinstance(value, bytes)] == texts


@pytest.mark.parametrize("raw", [b'[{"text": "a"}, {"text": "b', b'[{"text": "a"},', b'[{"text": "a"}] x'])
def test_a_truncated_array_is_reported(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    first, *_, last = _read(path)
    assert first == b"a"
    assert isinstance(last, BadDocument)
    assert last.reason.startswith("not valid JSON: ")


def test_broken_rows_of_a_table_are_reported_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\nfine,1\nshort\n"a"b,2\nG\xf6del,3\n\nlast,4\n"open,5\n')
    found = _read(path)
    assert (found[0], found[4], found[5]) == (b"fine", b"", b"last")
    reasons = {bad.line: bad.reason for bad in found if isinstance(bad, BadDocument)}
    assert reasons[2] == "1 columns in a table of 2"
    assert reasons[3].startswith("not valid CSV: ")
    assert reasons[4] == "not valid UTF-8"
    assert reasons[7] == "not valid CSV: unexpected end of data"
    assert _read(path, "body") == [BadDocument(1, "no column 'body'; it has text, n", lost=7)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_empty_compressed_file_was_cut_short(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.touch()
    found = _read(path)
    if not compression:
        assert found == []
        return
    (bad,) = found
    assert isinstance(bad, BadDocument)
    assert "data end too early: the file was cut short" in bad.reason


@pytest.mark.parametrize("compression", [".xz", ".bz2"])
@pytest.mark.parametrize("change", ["cut", "damaged"])
def test_damaged_and_truncated_files_are_reported(tmp_path: Path, compression: str, change: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    whole = COMPRESSIONS[compression](json_lines("first", "second"))
    path.write_bytes(whole[:-6] if change == "cut" else whole[:20] + b"XXXXXXXX" + whole[28:])
    *_, last = _read(path)
    assert isinstance(last, BadDocument)
    assert ("data end too early" if change == "cut" else "damaged ") in last.reason
    assert last.reason.endswith("; the rest of the file is left out")


def test_a_zstd_file_with_a_window_of_two_gibibytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=31, enable_ldm=False, hash_log=10, chain_log=10
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(json_lines("wide")) + compressor.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert _read(path) == [b"wide"]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
def test_inflation_is_bounded_whatever_the_ratio(compression: str) -> None:
    raw = COMPRESSIONS[compression](bytes(1 << 28))
    largest = total = 0
    for block in decompress([raw], compression):
        largest, total = max(largest, len(block)), total + len(block)
    assert total == 1 << 28
    assert largest <= 1 << 26


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, parsing):
        monkeypatch.setattr(module, "LARGEST_DOCUMENT_BYTES", 1000)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.zst", "a.json", "b.json", "a.csv", "a.parquet", "a.txt"]
)
@pytest.mark.usefixtures("small_limit")
def test_a_document_that_is_too_large_for_memory_is_left_out_and_the_next_is_read(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    texts = ["before", "x" * 3_000_000, "after"]
    lines = json_lines(*texts)
    if name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    elif name == "b.json":
        path.write_bytes(json.dumps([{"text": text} for text in texts]).encode())
    elif name == "a.csv":
        path.write_bytes(b"text\n" + "\n".join(texts).encode())
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif name == "a.txt":
        path.write_text("|".join(texts))
    else:
        path.write_bytes(lines)
    found = _read(path, separator="|")
    bad = [(index, one.reason) for index, one in enumerate(found) if isinstance(one, BadDocument)]
    if name == "a.csv":  # a quoted value may span lines, so no later row can be trusted
        assert found[0] == b"before"
        assert TOO_LARGE in bad[0][1]
        return
    assert [one for one in found if isinstance(one, bytes)] == [b"before", b"after"]
    assert bad == [(1, TOO_LARGE)]


def _blocks(text: bytes, size: int) -> Iterator[bytes]:
    return (text[start : start + size] for start in range(0, len(text), size))


@given(
    texts=st.lists(st.text("ab<\n", min_size=1, max_size=9), min_size=1, max_size=6), size=st.integers(1, 20)
)
@settings(max_examples=300, deadline=None)
def test_text_between_separators_is_returned_wherever_blocks_end(texts: list[str], size: int) -> None:
    raw = "|SEP|".join(texts).encode()
    found = [text for _, text in split_text(_blocks(raw, size), b"|SEP|")]
    assert found == [text for _, text in split_text([raw], b"|SEP|")]
    joined = b"".join(text for text in found if isinstance(text, bytes))
    assert joined.replace(b"\n", b"") == "".join(texts).replace("\n", "").encode()


def test_a_text_file_is_split_at_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n<|end|>\nthree <|end|> four\n<|end|>\r\n<|end|>\nG\xf6del\n<|end|>\n")
    assert _read(path, separator="<|end|>") == [
        b"one\ntwo\n",
        b"three ",
        b" four\n",
        b"",
        BadDocument(7, "not valid UTF-8", 2),
    ]


@pytest.mark.parametrize(
    ("line", "document"),
    [
        (b'{"n": ' + b"9" * 5000 + b', "text": "long number"}', b"long number"),
        (b'{"n": -' + b"9" * 5000 + b', "text": NaN}', "'text' is float, not a string"),
        (b'{"n": ' + b"[" * 5000 + b"]" * 5000 + b', "text": "deep"}', "JSON that is nested too deeply"),
        (b'{"text": "a", "n": 01}', "not valid JSON: Expecting ',' delimiter"),
        (b'{"meta": {"text": "nested"}}', b"nested"),
        (b'{"meta": {"text": 5}, "meta.text": "literal"}', b"literal"),
        (b'{"meta": ["text"]}', "no field 'meta.text'"),
        (b'{"meta": null}', "no field 'meta.text'"),
    ],
)
def test_unusual_json_is_read_or_named(tmp_path: Path, line: bytes, document: bytes | str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    (found,) = _read(path, "meta.text" if b"meta" in line else "text")
    if isinstance(document, bytes):
        assert found == document
    else:
        assert isinstance(found, BadDocument)
        assert found.reason.startswith(document)
        assert found.column == (21 if "delimiter" in document else None)


def test_nested_and_binary_columns_of_a_table_are_read(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "a", "n": 1}}, {"meta": {"text": None, "n": 2}}, {"meta": None}]
    table = pyarrow.table({"meta": [row["meta"] for row in rows], "raw": [b"x", b"\xff", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        null = "'meta.text' is null"
        assert _read(tmp_path / name, "meta.text") == [b"a", BadDocument(2, null), BadDocument(3, null)]
        assert _read(tmp_path / name, "raw") == [
            b"x",
            BadDocument(2, "not valid UTF-8"),
            BadDocument(3, "'raw' is null"),
        ]
        (bad,) = _read(tmp_path / name, "meta.none")
        assert bad == BadDocument(1, "no column 'meta.none'; it has meta, raw", lost=3)


def test_row_groups_without_rows_are_skipped(tmp_path: Path) -> None:
    schema = pyarrow.schema([("flag", pyarrow.bool_()), ("text", pyarrow.string())])
    path = tmp_path / "a.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        writer.write_table(schema.empty_table())
        writer.write_table(pyarrow.table({"flag": [True], "text": ["a"]}, schema=schema))
    assert _read(path) == [b"a"]
    pyarrow.parquet.write_table(schema.empty_table(), path)
    assert _read(path) == []
