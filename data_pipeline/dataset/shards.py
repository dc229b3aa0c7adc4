"""Token shards: Megatron's .bin and .idx files, byte for byte. They are written once, durably, then mapped.

A shard is written under a temporary name and renamed by the caller when it is complete; after that it never
changes. A .sum file next to each pair lists the checksum of every block (JSON), so that damage can be located
and a part of a file can be verified by itself.
"""

import json
import mmap
import os
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.integrity import check_shard
from data_pipeline.dataset.manifest import BLOCK_BYTES, FileRecord, Shard
from data_pipeline.dataset.megatron_index import HEADER, ITEM_BYTES, Header, read_header
from data_pipeline.durable import fsync_file
from data_pipeline.errors import DataError


class ShardWriter:
    """Writes `folder/name`.bin, .idx and .sum; each document is one sequence.

    The files are valid and durable only after `finish`. Memory grows by four bytes per document.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.tokens = 0
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._lengths = array("i")
        self._bin = _ChecksummedFile(folder / f"{name}.bin")

    def write(self, ids: NDArray[np.generic], lengths: "array[int]") -> None:
        """Append documents of `lengths` tokens each, whose ids are concatenated in `ids`."""
        self._bin.write(np.ascontiguousarray(ids, self._dtype).view(np.uint8).data)
        self._lengths.extend(lengths)
        self.tokens += len(ids)

    def finish(self) -> Shard:
        """Write the index and the checksums, make all files durable, and return the manifest's record."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:])
        offsets *= ITEM_BYTES[self._dtype]
        idx = _ChecksummedFile(self._folder / f"{self._name}.idx")
        idx.write(Header(self._dtype, len(lengths), len(lengths)).pack())
        idx.write(lengths.tobytes())
        idx.write(offsets.tobytes())
        idx.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        bin_record, idx_record = self._bin.finish(), idx.finish()
        sum_file = _ChecksummedFile(self._folder / f"{self._name}.sum")
        sum_file.write(sums_content(self._bin.block_sums, idx.block_sums))
        return Shard(self._name, self.tokens, len(lengths), bin_record, idx_record, sum_file.finish())


def sums_content(bin_sums: Sequence[str], idx_sums: Sequence[str]) -> bytes:
    """The content of a .sum file, given the checksums of the blocks of both files."""
    sums = {"algorithm": "xxh3_128", "chunk_bytes": BLOCK_BYTES, "bin": bin_sums, "idx": idx_sums}
    return (json.dumps(sums, indent=0) + "\n").encode()


class _ChecksummedFile:
    """A new file. Its checksum and those of its blocks of BLOCK_BYTES are computed while it is written."""

    def __init__(self, path: Path) -> None:
        import xxhash  # readers do not need it

        self.block_sums: list[str] = []
        self._file = path.open("xb")
        self._new_sum = xxhash.xxh3_128
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_128()
        self._size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._whole.update(data)
        rest = memoryview(data)
        while len(rest):
            room = BLOCK_BYTES - self._size_bytes % BLOCK_BYTES
            part, rest = rest[:room], rest[room:]
            self._block.update(part)
            self._size_bytes += len(part)
            if len(part) == room:
                self._close_block()

    def _close_block(self) -> None:
        self.block_sums.append(self._block.hexdigest())
        self._block = self._new_sum()

    def finish(self) -> FileRecord:
        if self._size_bytes % BLOCK_BYTES:
            self._close_block()
        fsync_file(self._file)
        self._file.close()
        return FileRecord(self._size_bytes, self._whole.hexdigest())


class IndexArrays:
    """The arrays of an .idx file, memory-mapped. The caller checks the file's size against its header."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self._path = path
        raw = _map(path)
        self._lengths = np.frombuffer(raw, "<i4", header.sequences, HEADER.size)
        self._offsets = np.frombuffer(raw, "<i8", header.sequences, header.offsets_start)
        self._first_sequences = np.frombuffer(raw, "<i8", header.documents + 1, header.documents_start)

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences."""
        return int(self._lengths.sum(dtype=np.int64))

    def document_lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each document [documents]."""
        ends = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=ends[1:])
        lengths: NDArray[np.int64] = np.diff(ends[self._first_sequences])
        return lengths

    def require_contiguous(self, item_bytes: int) -> None:
        """Raises DataError unless the sequences are contiguous and the documents cover them in order."""
        ends = np.cumsum(self._lengths, dtype=np.int64)
        starts = (ends - self._lengths) * item_bytes
        first = self._first_sequences
        if (self._lengths < 0).any() or not np.array_equal(self._offsets, starts):
            raise DataError(f"{self._path}: its sequences are not contiguous in the .bin file")
        if first[0] != 0 or first[-1] != len(self._lengths) or (np.diff(first) < 0).any():
            raise DataError(f"{self._path}: its documents do not contain every sequence once and in order")


class MappedShard:
    """A memory-mapped shard. Opening it reads no data; it keeps two file descriptors open.

    `ids` contains the tokens [tokens] in the shard's dtype. Raises DataError if the size of a file or the
    kind of the index differs from the manifest.
    """

    def __init__(self, folder: Path, shard: Shard, dtype: str) -> None:
        problems = check_shard(folder, shard, dtype)
        if problems:
            raise DataError("\n".join(problems))
        header = read_header(folder / f"{shard.name}.idx")
        self._item_bytes = ITEM_BYTES[dtype]
        self.ids = np.frombuffer(_map(folder / f"{shard.name}.bin"), dtype=dtype)
        index = memoryview(_map(folder / f"{shard.name}.idx"))
        # memoryviews, not arrays: the index is unaligned, and numpy's searchsorted would copy all of it.
        self._offsets = index[header.offsets_start : header.documents_start].cast("q")
        self._first_sequences = index[header.documents_start : header.idx_bytes].cast("q")

    def document_starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """The positions among the tokens [first, stop) at which documents start, ascending."""
        begin = bisect_left(self._offsets, first * self._item_bytes)
        end = bisect_left(self._offsets, stop * self._item_bytes, begin)
        low = bisect_left(self._first_sequences, begin)
        high = bisect_left(self._first_sequences, end, low)
        sequences = np.array(self._first_sequences[low:high], dtype=np.int64)
        return np.array(self._offsets[begin:end], dtype=np.int64)[sequences - begin] // self._item_bytes


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Windows are read in random order; without this, each read loads 128 KiB around the window into memory.
    mapping.madvise(mmap.MADV_RANDOM)
    return mapping
