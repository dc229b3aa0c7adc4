"""Decompresses files block by block; data that ends too early is an error.

A compressed file can only be read from its beginning. Memory stays bounded, whatever the ratio of a file:
each step returns a few megabytes at most.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_HEAD_BYTES = 1 << 20
# A decompressor that cannot limit its output gets input of this size. For gzip, whose ratio is at most 1032,
# that is 33 MB of output. zstd can turn 4 bytes into 128 KiB, so it gets less; smaller parts cost no time.
_GZIP_PART_BYTES = 1 << 15
_ZSTD_PART_BYTES = 1 << 10
# The most that bz2 and xz return at a time.
_MOST_OUTPUT_BYTES = 1 << 22
# zstd refuses larger windows than 128 MiB unless it is asked; `zstd --long=31` writes these.
_LARGEST_WINDOW_BYTES = 1 << 31
_NAMES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}

REST_LOST = "; the rest of the file is left out"
"""The end of the reason for a file that is read in part: how many documents are lost is unknown."""


class DamagedError(Exception):
    """Compressed data that cannot be decompressed or ends too early."""


def decompress(blocks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """The decompressed content of a file's `blocks`. `compression` is .gz, .zst, .xz, .bz2 or empty.

    Raises DamagedError if the data is damaged or truncated, after yielding everything before that place.
    """
    if not compression:
        return iter(blocks)
    part_bytes = _ZSTD_PART_BYTES if compression == ".zst" else _GZIP_PART_BYTES
    return _inflate(blocks, _MEMBERS[compression], _NAMES[compression], part_bytes)


def text_per_byte(path: Path, compression: str) -> float:
    """The ratio of decompressed to compressed bytes in the file's first mebibyte; at least 1."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    plain = 0
    with suppress(DamagedError):  # the head usually ends in the middle of a member
        for block in decompress([head], compression):
            plain += len(block)
    return max(1.0, plain / max(1, len(head)))


class _Member(Protocol):
    """A decompressor of one member of a file."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def blocks(self, data: bytes) -> Iterator[bytes]: ...


class _Unlimited:
    """A member of a gzip or zstd file: each input gives all of its output at once."""

    def __init__(self, decompressor: "_Decompressor") -> None:
        self._decompressor = decompressor

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def blocks(self, data: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(data)


class _Limited(_Unlimited):
    """A member of an xz or bzip2 file: each input gives its output in parts."""

    _decompressor: "lzma.LZMADecompressor | bz2.BZ2Decompressor"

    def blocks(self, data: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(data, _MOST_OUTPUT_BYTES)
        while not self._decompressor.eof and not self._decompressor.needs_input:
            yield self._decompressor.decompress(b"", _MOST_OUTPUT_BYTES)


class _Decompressor(Protocol):
    """The interface that the decompression objects of all formats share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd_member() -> _Member:
    import zstandard

    # zstandard's stream reader does not report a truncated file.
    return _Unlimited(zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES).decompressobj())


_MEMBERS: dict[str, Callable[[], _Member]] = {
    ".gz": lambda: _Unlimited(zlib.decompressobj(wbits=31)),
    ".zst": _zstd_member,
    ".xz": lambda: _Limited(lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    ".bz2": lambda: _Limited(bz2.BZ2Decompressor()),
}


def _inflate(
    blocks: Iterable[bytes], member: Callable[[], _Member], kind: str, part_bytes: int
) -> Iterator[bytes]:
    """The decompressed blocks of a file of one or more members, each of which must be complete."""
    import zstandard

    current: _Member | None = None
    is_empty = True
    try:
        for block in blocks:
            for start in range(0, len(block), part_bytes):
                part = block[start : start + part_bytes]
                if current is None and not is_empty and kind == "xz" and not part.strip(b"\0"):
                    continue  # xz allows zero bytes after a stream
                while part:
                    is_empty = False
                    if current is None:
                        current = member()
                    for plain in current.blocks(part):
                        if plain:
                            yield plain
                    if not current.eof:
                        break
                    part, current = current.unused_data, None
    except (zlib.error, lzma.LZMAError, OSError, EOFError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # reading failed; bz2 reports damaged data as an OSError without a number
        raise DamagedError(f"damaged {kind} data: {error}") from None
    if current is not None or is_empty:
        raise DamagedError(f"the {kind} data end too early: the file was cut short")
