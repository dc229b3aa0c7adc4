"""Files past the page cache, and through it where the file system wants that."""

import ctypes
import errno
import fcntl
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint import direct_io as direct
from gpt.checkpoint.direct_io import BUFFER_BYTES, DirectReader, DirectWriter

SIZES = (0, 1, 4095, 4096, 4097, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 4096, 2 * BUFFER_BYTES + 77)


def write_in_pieces(path: Path, content: bytes, chance: random.Random) -> int:
    with DirectWriter(path) as file:
        at = 0
        while at < len(content):
            piece = content[at : at + chance.choice((1, 63, 4096, 100_000, BUFFER_BYTES, 2 * BUFFER_BYTES))]
            file.write(piece)
            at += len(piece)
        file.flush()
        file.sync()
        return file.size


def read_at_random(path: Path, content: bytes, chance: random.Random) -> None:
    with DirectReader(path) as file:
        for _ in range(20):
            start = chance.randrange(len(content) + 10)
            target = bytearray(chance.choice((1, 100, 4096, BUFFER_BYTES, BUFFER_BYTES + 5)))
            file.seek(start)
            count = file.readinto(target)
            assert target[:count] == content[start : start + len(target)]
            assert count == len(content[start : start + len(target)])


@pytest.fixture(params=["direct", "refused when it is opened", "refused when it is used"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's, and two that do not do it."""
    real_open, real_write, real_preadv = os.open, os.write, os.preadv

    def is_direct(descriptor: int) -> bool:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    match request.param:
        case "refused when it is opened":
            monkeypatch.setattr(
                direct.os,
                "open",
                lambda path, flags, *a: (refuse if flags & os.O_DIRECT else real_open)(path, flags, *a),
            )
        case "refused when it is used":
            monkeypatch.setattr(
                direct.os, "write", lambda fd, *a: (refuse if is_direct(fd) else real_write)(fd, *a)
            )
            monkeypatch.setattr(
                direct.os, "preadv", lambda fd, *a: (refuse if is_direct(fd) else real_preadv)(fd, *a)
            )


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("size", SIZES)
def test_writes_of_any_size_read_back_at_any_offset(tmp_path: Path, size: int) -> None:
    chance = random.Random(size)
    content, path = chance.randbytes(size), tmp_path / "file"
    path.write_bytes(b"an older and longer content" * 1000)
    assert write_in_pieces(path, content, chance) == size
    assert path.read_bytes() == content
    read_at_random(path, content, chance)


def test_large_file_is_not_in_the_page_cache_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with DirectWriter(path) as file:
        if not fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            pytest.skip("this file system is read and written through the page cache")
        for _ in range(16):
            file.write(bytes(BUFFER_BYTES))
        file.flush()
        file.sync()
    with DirectReader(path) as read:
        target = bytearray(BUFFER_BYTES)
        while read.readinto(target):
            pass
    assert cached_bytes(path) < BUFFER_BYTES
    path.read_bytes()
    assert cached_bytes(path) > 15 * BUFFER_BYTES


def cached_bytes(path: Path) -> int:
    """How much of a file the page cache holds: mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_ubyte.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), pages) == 0
        del start, address
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_full_disk_is_not_mistaken_for_one_without_direct_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(direct.os, "write", full)
    with DirectWriter(tmp_path / "file") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(BUFFER_BYTES))
