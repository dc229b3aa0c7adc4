"""Decompresses gzip and zstd files block by block; data that ends too early is an error.

A compressed file can only be read from its beginning.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_HEAD_BYTES = 1 << 20
# The decompressor gets input of this size: it returns everything that a part of the input contains at once.
_INFLATE_BYTES = 1 << 15


class DamagedError(Exception):
    """Compressed data that cannot be decompressed or ends too early."""


def decompress(blocks: Iterable[bytes], suffix: str) -> Iterator[bytes]:
    """The decompressed content of a file's `blocks`. The file's `suffix` selects gzip, zstd or neither.

    Raises DamagedError if the data is damaged or truncated, after yielding everything before that place.
    """
    if suffix.endswith(".gz"):
        return _gunzip(blocks)
    if suffix.endswith(".zst"):
        return _unzstd(blocks)
    return iter(blocks)


def text_per_byte(path: Path, suffix: str) -> float:
    """The ratio of decompressed to compressed bytes in the file's first mebibyte; at least 1."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    plain = 0
    with suppress(DamagedError):  # the head usually ends in the middle of a member
        for block in decompress([head], suffix):
            plain += len(block)
    return max(1.0, plain / max(1, len(head)))


class _Decompressor(Protocol):
    """The interface that zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _gunzip(blocks: Iterable[bytes]) -> Iterator[bytes]:
    return _inflate(blocks, lambda: zlib.decompressobj(wbits=31), "gzip")


def _unzstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    # zstandard's stream reader does not report a truncated file.
    decompressor = zstandard.ZstdDecompressor()
    return _inflate(blocks, lambda: decompressor.decompressobj(), "zstd")


def _inflate(blocks: Iterable[bytes], member: Callable[[], _Decompressor], kind: str) -> Iterator[bytes]:
    """The decompressed blocks of a file of one or more members, each of which must be complete."""
    import zstandard

    current: _Decompressor | None = None
    try:
        for block in blocks:
            for start in range(0, len(block), _INFLATE_BYTES):
                part = block[start : start + _INFLATE_BYTES]
                while part:
                    if current is None:
                        current = member()
                    if plain := current.decompress(part):
                        yield plain
                    if not current.eof:
                        break
                    part, current = current.unused_data, None
    except (zlib.error, zstandard.ZstdError) as error:
        raise DamagedError(f"damaged {kind} data: {error}") from None
    if current is not None:
        raise DamagedError(f"the {kind} data end too early: the file was cut short")
