"""Checks the files of a data directory against its manifest: quickly, or every byte.

Nothing here repairs a file.
"""

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
    """A file of a data set that differs from the manifest, from byte `offset` on."""

    path: Path
    offset: int
    reason: str


def check(folder: Path, manifest: Manifest) -> list[str]:
    """The problems that can be found without reading the data, one sentence per bad file.

    Checks that every file exists and has the right size, every index header, and the bytes of encoding.json.
    """
    problems = []
    bad = _verify_file(folder / ENCODING_FILE, manifest.encoding)
    if bad is not None:
        problems.append(f"{bad.path}: not the encoding that the shards were made with: {bad.reason}")
    for shard in (*manifest.train, *manifest.val):
        problems += check_shard(folder, shard, manifest.dtype)
    return problems


def check_shard(folder: Path, shard: Shard, dtype: str) -> list[str]:
    """The problems of one shard that can be found without reading its data."""
    # Paths are plain strings: for ten thousand shards, pathlib alone takes 0.3 s.
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
            f"{path}: its header describes {header.documents} documents in {header.dtype} and "
            f"{header.idx_bytes} bytes, but the manifest {shard.documents} documents in {dtype} and "
            f"{shard.idx.size_bytes} bytes"
        ]
    return []


def verify(folder: Path) -> Iterator[BadDataFile]:
    """Yields each file of a data directory that differs in any byte, with the offset of its first bad block.

    Raises DataError if there is no manifest. If the manifest is damaged, only that is reported, because it is
    what the other files are compared with.
    """
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        if not (folder / FILE_NAME).exists():
            raise
        yield BadDataFile(folder / FILE_NAME, 0, str(error).removeprefix(f"{folder / FILE_NAME}: "))
        return
    bad = _verify_file(folder / ENCODING_FILE, manifest.encoding)
    if bad is not None:
        yield bad
    for shard in (*manifest.train, *manifest.val):
        path = folder / f"{shard.name}.sum"
        bad = _verify_file(path, shard.sum)
        if bad is not None:
            yield bad
        sums = {} if bad is not None else json.loads(path.read_bytes())
        for kind, record in (("bin", shard.bin), ("idx", shard.idx)):
            bad = _verify_file(folder / f"{shard.name}.{kind}", record, sums.get(kind, ()))
            if bad is not None:
                yield bad


def _size_problem(path: Path | str, size_bytes: int) -> str | None:
    try:
        actual = os.stat(path).st_size  # noqa: PTH116 (called for many files)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if actual == size_bytes else f"{actual} bytes, should be {size_bytes}"


def _verify_file(
    path: Path, record: FileRecord | EncodingRecord, block_sums: tuple[str, ...] = ()
) -> BadDataFile | None:
    """The first problem of the file at `path`, which is read completely. Without `block_sums`, the offset of
    changed bytes is 0."""
    import xxhash

    problem = _size_problem(path, record.size_bytes)
    whole = xxhash.xxh3_128()
    offset = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                number = offset // BLOCK_BYTES
                is_complete = len(block) == min(BLOCK_BYTES, record.size_bytes - offset)
                has_sum = is_complete and number < len(block_sums)
                if has_sum and xxhash.xxh3_128_hexdigest(block) != block_sums[number]:
                    reason = problem or f"its bytes changed (within {len(block)} bytes)"
                    return BadDataFile(path, offset, reason)
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
