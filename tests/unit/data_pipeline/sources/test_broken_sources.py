"""Broken documents in each kind of source are counted by reason and listed with their line, or skipped."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.sources.hub import HubDataset
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.run.exit_codes import exit_code_of
from tests.unit.data_pipeline.support import config, documents_of

# Long and dissimilar enough that a truncated compressed file still contains many documents.
TEXTS = [f"document {n}: " + " ".join(str(n * k * 7919 % 10_007) for k in range(1200)) for n in range(60)]
CUT_GZIP = "the gzip data end too early: the file was cut short"
REST = "; the rest of the file is left out"
CUT_ZSTD = "the zstd data end too early: the file was cut short"


def _lines() -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in TEXTS]


def _with_bad_lines() -> bytes:
    lines = _lines()
    lines[3] = b'{"text": "cut sho'
    lines[7] = b'{"body": "no such field"}'
    lines[11] = '{"text": "Müller"}'.encode("latin-1")
    lines[12] = b'{"text": null}'
    lines[40] = b"nonsense"
    return b"\n".join(lines) + b"\n"


BAD_LINES = {
    4: "not valid JSON: Unterminated string starting at",
    8: "no field 'text'",
    12: "not valid UTF-8",
    13: "'text' is null",
    41: "not valid JSON: Expecting value",
}


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def _whole() -> bytes:
    return b"\n".join(_lines()) + b"\n"


def _cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def _table(values: pyarrow.Array, column: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({column: values, "n": range(len(values))})
    pyarrow.parquet.write_table(table, sink, row_group_size=10, compression="none", use_dictionary=False)
    return bytes(sink.getvalue().to_pybytes())


def _not_utf8_column() -> bytes:
    raw = [text.encode() for text in TEXTS]
    raw[5] = "Müller".encode("latin-1")
    # Bytes declared as text, as a careless writer leaves them.
    return _table(pyarrow.array(raw, pyarrow.binary()).view(pyarrow.utf8()))


def _bad_page() -> bytes:
    content = bytearray(_table(pyarrow.array(TEXTS)))
    begin = content.index(TEXTS[30].encode()) - 4  # the length of the first value of the fourth group
    content[begin : begin + 4] = b"\xff\xff\xff\x7f"
    return bytes(content)


Made = Callable[[], bytes]


@pytest.mark.parametrize(
    ("name", "content", "bad", "kept"),  # the reasons by line, and the number of good documents
    [
        ("a.jsonl", _with_bad_lines, BAD_LINES, 55),
        ("a.jsonl.gz", lambda: gzip.compress(_with_bad_lines()), BAD_LINES, 55),
        ("a.jsonl.zst", lambda: _zstd(_with_bad_lines()), BAD_LINES, 55),
        ("a.jsonl", lambda: _cut(_whole()), {41: "not valid JSON: Unterminated string starting at"}, 40),
        ("a.jsonl.gz", lambda: _cut(gzip.compress(_whole())), {None: CUT_GZIP + REST}, None),
        ("a.jsonl.zst", lambda: _cut(_zstd(_whole())), {None: CUT_ZSTD + REST}, None),
        ("a.txt", lambda: "one\nMüller".encode("latin-1"), {2: "not valid UTF-8"}, 0),
        ("a.txt.gz", lambda: _cut(gzip.compress(_whole())), {1: CUT_GZIP}, 0),
        ("a.txt.zst", lambda: _cut(_zstd(_whole())), {1: CUT_ZSTD}, 0),
        ("a.parquet", lambda: _table(pyarrow.array([*TEXTS[:9], None])), {10: "'text' is null"}, 9),
        (
            "a.parquet",
            lambda: _table(pyarrow.array(TEXTS), "body"),
            {1: "no column 'text'; it has body, n"},
            0,
        ),
        (
            "a.parquet",
            lambda: _table(pyarrow.array([1, 2])),
            {1: "'text' is int, not a string", 2: "'text' is int, not a string"},
            0,
        ),
        ("a.parquet", _not_utf8_column, {6: "not valid UTF-8"}, 59),
        ("a.parquet", lambda: _cut(_table(pyarrow.array(TEXTS))), {1: "not a readable Parquet file: "}, 0),
        ("a.parquet", _bad_page, {31: "rows to the end of their group are unreadable: "}, 50),
    ],
)
def test_broken_documents_of_each_kind_of_file_are_listed_or_skipped(
    tmp_path: Path, name: str, content: Made, bad: dict[int | None, str], kept: int | None
) -> None:
    broken, good = tmp_path / name, tmp_path / "z.jsonl"
    broken.write_bytes(content())
    good.write_bytes(b'{"text": "a whole document"}\n')
    settings = config(tmp_path / "data", broken, good, val_fraction=0)
    with pytest.raises(DataError) as error:
        prepare(settings)
    assert exit_code_of(error.value) == 2
    first, *listed, last = str(error.value).split("\n")
    assert first.startswith("broken documents: ")
    assert last == 'Repair them and run again, or leave them out with on_bad = "skip"'
    assert len(listed) == len(bad)
    for line, (number, reason) in zip(listed, bad.items(), strict=True):
        assert line.startswith(f"{broken}:")
        place = re.escape(f"{broken}:{number}:") + r"(\d+:)? "  # the column, if it is known
        assert re.match(place + re.escape(reason), line) if number else line.endswith(reason)
    assert not list(tmp_path.glob("data/[!.]*"))
    manifest = prepare(config(tmp_path / "data", broken, good, val_fraction=0, on_bad="skip"))
    lost = {"no column": 60, "rows to the end": 10}  # documents that one reason leaves out
    for reason in bad.values():
        found = sum(count for text, count in manifest.skipped.items() if text.startswith(reason))
        each = next((count for start, count in lost.items() if reason.startswith(start)), 1)
        assert found == each * sum(other == reason for other in bad.values())
    encoding = load_encoding("outlast-4k")
    texts = [encoding.decode(ids[:-1].tolist()) for ids in documents_of(tmp_path / "data", "train")]
    assert texts[-1] == "a whole document"
    if kept is None:  # the documents before the truncation are kept, in order
        assert 10 < len(texts) < 60
        assert texts[:-1] == TEXTS[: len(texts) - 1]
    else:
        assert len(texts) == kept + 1
    assert set(texts[:-1]) <= set(TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", _with_bad_lines),
        ("a.jsonl.gz", lambda: _cut(gzip.compress(_whole()))),
        ("a.parquet", lambda: _cut(_table(pyarrow.array(TEXTS)))),
        ("a.parquet", _bad_page),
    ],
)
def test_a_file_that_datasets_cannot_read_ends_the_preparation_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Made, streaming: bool
) -> None:
    """`datasets` parses a file completely or not at all, so no line of it can be skipped."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_bytes(content())
    settings = config(
        tmp_path / "data", datasets=(HubDataset(name=str(folder), streaming=streaming),), on_bad="skip"
    )
    with pytest.raises(
        (ConfigError, DataError), match=r"cannot be loaded: |reading shards 0 to 1 failed: "
    ) as error:
        prepare(settings)
    assert exit_code_of(error.value) == 2
    assert not list(tmp_path.glob("data/[!.]*"))
