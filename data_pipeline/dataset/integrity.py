"""Whether the files of a data directory are what its manifest says: at a glance, or byte by byte."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.dataset.manifest import (
    BLOCK_BYTES,
    ENCODING_FILE,
    FILE_NAME,
    EncodingRecord,
    FileRecord,
    Manifest,
    Shard,
    read_manifest,
)
from data_pipeline.dataset.megatron_index import read_header
from data_pipeline.errors import DataError


class BadDataFile(NamedTuple):
    """A file of a data set that is not what the manifest says, from byte `offset` on."""

    path: Path
    offset: int
    reason: str


def check(folder: Path, manifest: Manifest) -> list[str]:
    """What can be seen to be wrong without reading the data, one sentence for each bad file.

    Looks at every file's existence and size, every index header, and the bytes of encoding.json.
    """
    problems = []
    bad = _bad_record(folder / ENCODING_FILE, manifest.encoding)
    if bad is not None:
        problems.append(f"{bad.path}: not the encoding that the shards were made with: {bad.reason}")
    for shard in (*manifest.train, *manifest.val):
        problems += check_shard(folder, shard, manifest.dtype)
    return problems


def check_shard(folder: Path, shard: Shard, dtype: str) -> list[str]:
    """What can be seen to be wrong with one shard without reading its data."""
    # Paths as plain strings: with ten thousand shards pathlib alone takes a third of a second.
    problems = [
        f"{folder}/{name}: {problem}"
        for name, record in shard.files.items()
        if (problem := _size_problem(f"{folder}/{name}", record.size_bytes))
    ]
    if problems:
        return problems
    path = f"{folder}/{shard.name}.idx"
    try:
        header = read_header(path)
    except DataError as error:
        return [str(error)]
    expected = (dtype, shard.documents, shard.idx.size_bytes)
    if (header.dtype, header.documents, header.idx_bytes) != expected:
        return [
            f"{path}: its header speaks of {header.documents} documents in {header.dtype} and "
            f"{header.idx_bytes} bytes, the manifest of {shard.documents} in {dtype} and "
            f"{shard.idx.size_bytes} bytes"
        ]
    return []


def verify(folder: Path) -> Iterator[BadDataFile]:
    """Each file of a data directory that differs in any byte, with the first bad chunk's offset.

    Raises DataError where there is no manifest at all; a damaged manifest is the only thing reported, since
    nothing else can be trusted then.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        if not (folder / FILE_NAME).exists():
            raise
        yield BadDataFile(folder / FILE_NAME, 0, str(error).removeprefix(f"{folder / FILE_NAME}: "))
        return
    bad = _bad_record(folder / ENCODING_FILE, manifest.encoding)
    if bad is not None:
        yield bad
    for shard in (*manifest.train, *manifest.val):
        path = folder / f"{shard.name}.sum"
        bad = _bad_record(path, shard.sum)
        if bad is not None:
            yield bad
        chunks = {} if bad is not None else json.loads(path.read_bytes())
        for kind, record in (("bin", shard.bin), ("idx", shard.idx)):
            bad = _bad_record(folder / f"{shard.name}.{kind}", record, chunks.get(kind, ()))
            if bad is not None:
                yield bad


def _size_problem(path: Path | str, size_bytes: int) -> str | None:
    try:
        actual = os.stat(path).st_size  # noqa: PTH116 (of many files)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if actual == size_bytes else f"{actual} bytes, should be {size_bytes}"


def _bad_record(
    path: Path, record: FileRecord | EncodingRecord, chunks: tuple[str, ...] = ()
) -> BadDataFile | None:
    """The first thing wrong with the file at `path`, read whole where its size is right or too small."""
    import xxhash

    problem = _size_problem(path, record.size_bytes)
    whole = xxhash.xxh3_128()
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                number = offset // BLOCK_BYTES
                is_whole = len(block) == min(BLOCK_BYTES, record.size_bytes - offset)
                if is_whole and number < len(chunks) and xxhash.xxh3_128_hexdigest(block) != chunks[number]:
                    return BadDataFile(
                        path, offset, problem or f"its bytes changed (within {len(block)} bytes)"
                    )
                whole.update(block)
                offset += len(block)
    except FileNotFoundError:
        return BadDataFile(path, 0, "missing")
    except OSError as error:
        return BadDataFile(path, offset, f"cannot be read: {error.strerror}")
    if problem:
        return BadDataFile(path, min(offset, record.size_bytes), problem)
    if whole.hexdigest() != record.xxh3_128:
        return BadDataFile(path, 0, "its bytes changed")
    return None
