"""The .idx header of Megatron's indexed data set: what it says, and how large the files must be for it.

    magic b"MMIDIDX\\0\\0" · version u64 = 1 · dtype code u8 · sequences S u64 · document boundaries D+1 u64
    lengths in tokens i32[S] · offsets in bytes i64[S] · first sequence of each document i64[D+1], last = S

Little-endian, unaligned, as megatron-core 0.16's `_IndexWriter` writes it. Standard library alone.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes for the two dtypes that hold token ids.
DTYPE_CODES = {"int32": 4, "uint16": 8}
ITEM_BYTES = {"int32": 4, "uint16": 2}
# Megatron keeps ids in uint16 below this vocabulary (DType.optimal_dtype).
_UINT16_VOCABULARY = 65_500


@dataclass(frozen=True)
class Header:
    """How many of what an .idx file describes."""

    dtype: str
    sequences: int
    documents: int

    @property
    def offsets_start(self) -> int:
        """Where the sequences' byte offsets begin in the file."""
        return HEADER.size + 4 * self.sequences

    @property
    def documents_start(self) -> int:
        """Where the documents' first sequences begin in the file."""
        return HEADER.size + 12 * self.sequences

    @property
    def idx_bytes(self) -> int:
        """Size of the whole .idx file."""
        return self.documents_start + 8 * (self.documents + 1)

    def pack(self) -> bytes:
        """The header's bytes."""
        return HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], self.sequences, self.documents + 1)


def dtype_for(vocab_size: int) -> str:
    """The dtype in which Megatron stores ids of a vocabulary."""
    return "uint16" if vocab_size < _UINT16_VOCABULARY else "int32"


def read_header(path: Path | str) -> Header:
    """The header of the .idx file at `path`. Raises DataError, naming it, where it is none."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (of many files)
            raw = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an index")
    magic, version, code, sequences, boundaries = HEADER.unpack(raw)
    if magic != MAGIC:
        raise DataError(f"{path}: not an index of token shards (it begins with {magic!r})")
    names = {code: name for name, code in DTYPE_CODES.items()}
    if version != 1 or code not in names or boundaries == 0:
        raise DataError(
            f"{path}: an index of version {version} with dtype code {code} and {boundaries} document "
            f"boundaries; version 1 with code {' or '.join(map(str, sorted(names)))} is read here"
        )
    return Header(names[code], sequences, boundaries - 1)
