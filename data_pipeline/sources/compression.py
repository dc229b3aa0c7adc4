"""gzip and zstd as streams of plain chunks, in which data that end too early are an error.

Compressed files can only be read from their beginning; nothing here pretends otherwise.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_HEAD_BYTES = 1 << 20
# Compressed data are handed to the decompressor in parts of this size: all that a part holds comes at once.
_INFLATE_BYTES = 1 << 15


class DamagedError(Exception):
    """Compressed data that does not decompress, or ends too early."""


def decompress(chunks: Iterable[bytes], suffix: str) -> Iterator[bytes]:
    """The plain bytes of a file's `chunks`: gunzipped, unzstded, or as they are, by its suffix.

    Raises DamagedError where the data are damaged or cut short, after all that came before.
    """
    if suffix.endswith(".gz"):
        return _gunzip(chunks)
    if suffix.endswith(".zst"):
        return _unzstd(chunks)
    return iter(chunks)


def text_per_byte(path: Path, suffix: str) -> float:
    """How many bytes of text a byte of a compressed file holds, by its first mebibyte; at least 1."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    plain = 0
    with suppress(DamagedError):  # the head ends early, of course
        for chunk in decompress([head], suffix):
            plain += len(chunk)
    return max(1.0, plain / max(1, len(head)))


class _Decompressor(Protocol):
    """What zlib's and zstandard's decompression objects share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    return _inflate(chunks, lambda: zlib.decompressobj(wbits=31), "gzip")


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    # Not zstandard's stream reader: it takes a file that was cut short for a whole one.
    decompressor = zstandard.ZstdDecompressor()
    return _inflate(chunks, lambda: decompressor.decompressobj(), "zstd")


def _inflate(chunks: Iterable[bytes], member: Callable[[], _Decompressor], kind: str) -> Iterator[bytes]:
    """Decompressed chunks of a file of one or more members, which must be whole."""
    import zstandard

    current: _Decompressor | None = None
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), _INFLATE_BYTES):
                part = chunk[start : start + _INFLATE_BYTES]
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
