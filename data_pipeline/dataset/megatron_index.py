"""The .idx header of Megatron's indexed data set, and the file sizes that follow from it.

    magic b"MMIDIDX\\0\\0" · version u64 = 1 · dtype code u8 · sequences S u64 · document boundaries D+1 u64
    lengths in tokens i32[S] · offsets in bytes i64[S] · first sequence of each document i64[D+1], last = S

Little-endian, unaligned, as megatron-core 0.16's `_IndexWriter` writes it. Needs only the standard
library.
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
# Megatron stores ids as uint16 for vocabularies below this size (DType.optimal_dtype).
_UINT16_VOCABULARY = 65_500


@dataclass(frozen=True)
class Header:
    """The header of an .idx file."""

    dtype: str
    sequences: int
    documents: int

    @property
    def offsets_start(self) -> int:
        """The position of the sequences' byte offsets in the file."""
        return HEADER.size + 4 * self.sequences

    @property
    def documents_start(self) -> int:
        """The position of the documents' first sequences in the file."""
        return HEADER.size + 12 * self.sequences

    @property
    def idx_bytes(self) -> int:
        """The size of the whole .idx file."""
        return self.documents_start + 8 * (self.documents + 1)

    def pack(self) -> bytes:
        """The header as bytes."""
        return HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], self.sequences, self.documents + 1)


def dtype_for(vocab_size: int) -> str:
    """The dtype in which Megatron stores the ids of a vocabulary of this size."""
    return "uint16" if vocab_size < _UINT16_VOCABULARY else "int32"


def read_header(path: Path | str) -> Header:
    """The header of the .idx file at `path`. Raises DataError if the file is not a supported index."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (called for many files)
            raw = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an index")
    magic, version, code, sequences, boundaries = HEADER.unpack(raw)
    if magic != MAGIC:
        raise DataError(f"{path}: not an index of a token shard (it begins with {magic!r})")
    names = {code: name for name, code in DTYPE_CODES.items()}
    if version != 1 or code not in names or boundaries == 0:
        raise DataError(
            f"{path}: an index of version {version} with dtype code {code} and {boundaries} document "
            f"boundaries; supported is version 1 with code {' or '.join(map(str, sorted(names)))}"
        )
    return Header(names[code], sequences, boundaries - 1)
