"""The chunks of the sources, and that every document of a split file is read once."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.prepare.chunk import Chunk
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.split import split_into_chunks
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.spans import locate_line
from tests.unit.data_pipeline.support import config, documents_of, files_of


def _texts(size_bytes: int) -> list[str]:
    choose = random.Random(5)
    texts, size = [], 0
    while size < size_bytes:
        texts.append(
            f"{len(texts)} " + "".join(choose.choices("abcdefghijklmnop äß\n", k=choose.randrange(9000)))
        )
        size += len(texts[-1].encode())
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return _texts(6_000_000)


def _write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines, compresslevel=1))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines, level=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    else:
        path.write_bytes(lines)
    return path


def _pieces(path: Path) -> list[Chunk]:
    # Small shards make small chunks, so a small file is split as a large one would be
    return split_into_chunks(find_files([path])[0], shard_tokens=100_000)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_large_file_is_split_and_each_document_read_once(
    tmp_path: Path, texts: list[str], suffix: str
) -> None:
    chunks = _pieces(_write(tmp_path / f"a{suffix}", texts))
    assert len(chunks) >= (2 if "." in suffix[1:] else 5)
    found = [
        document for chunk in chunks for span in chunk.spans for document in DocumentReader(span, "text")
    ]
    assert found == [text.encode() for text in texts]
    assert sum(chunk.size_bytes for chunk in chunks) == (tmp_path / f"a{suffix}").stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_a_split_file_gives_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, texts: list[str], suffix: str
) -> None:
    path = _write(tmp_path / f"a{suffix}", texts)
    for workers in (1, 2):
        prepare(config(tmp_path / str(workers), path, workers=workers, shard_tokens=100_000, val_fraction=0))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(documents_of(tmp_path / "1", "train")) == len(texts)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_documents_in_later_parts_are_located_by_the_line_of_the_file(
    tmp_path: Path, texts: list[str], suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    _write(path, texts)
    seen = 0
    for chunk in _pieces(path):
        for span in chunk.spans:
            reader = DocumentReader(span, "text")
            for _ in reader:
                seen += 1
                if reader.line == 1:  # the first of each span
                    assert locate_line(span, reader.line) == f"{path}:{seen}"
    assert seen == len(texts)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("keep", [0.2, 0.95])
def test_the_truncation_of_a_split_compressed_file_is_reported_once(
    tmp_path: Path, texts: list[str], suffix: str, keep: float
) -> None:
    path = _write(tmp_path / f"a{suffix}", texts)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    chunks = _pieces(path)
    if keep > 0.5:
        assert len(chunks) >= 2
    found: list[bytes] = []
    bad: list[str] = []
    for chunk in chunks:
        for span in chunk.spans:
            for document in DocumentReader(span, "text"):
                if isinstance(document, BadDocument):
                    bad.append(f"{locate_line(span, document.line)}: {document.reason}")
                else:
                    found.append(document)
    assert found == [text.encode() for text in texts[: len(found)]]
    assert 0 < len(found) < len(texts)
    assert len(bad) == 1
    assert "end too early" in bad[0]
    line = int(bad[0].removeprefix(f"{path}:").partition(":")[0])
    assert abs(line - len(found)) <= 1


def test_chunks_cover_every_byte_once_and_depend_only_on_the_sources(raw: Path, tmp_path: Path) -> None:
    files, _ = find_files([raw])
    for shard_tokens in (1000, 30_000, 10**8):
        covered: Counter[str] = Counter()
        found = split_into_chunks(files, shard_tokens)
        position: dict[str, int] = {}
        for chunk in found:
            for span in chunk.spans:
                assert position.get(span.source.name, 0) == span.start
                position[span.source.name] = span.stop
                covered[span.source.name] += span.size_bytes
        assert covered == Counter({file.name: file.size_bytes for file in files})
        assert len({chunk.name for chunk in found}) == len(found)
    assert len(split_into_chunks(files, 10**8)) == 1, "too small to split"
    large = [files[0].__class__("x.jsonl", str(tmp_path / "x.jsonl"), 10**12, 0)]
    assert 2400 < len(split_into_chunks(large, 100_000_000)) < 2600
    large = [files[0].__class__("x.jsonl", str(tmp_path / "x.jsonl"), 10**9, 0)]
    assert 60 < len(split_into_chunks(large, 100_000_000)) < 70
