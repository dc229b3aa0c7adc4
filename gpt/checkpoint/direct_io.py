"""Files that bypass the page cache: whole blocks move between the disk and our buffer (O_DIRECT, open(2)).

A checkpoint is then read back from the disk instead of from memory, its gigabytes displace nothing that the
training steps read, and the cores that compute the steps neither copy nor flush pages. On a file system
without O_DIRECT, reads and writes go through the cache.
"""

import errno
import fcntl
import io
import mmap
import os
from pathlib import Path
from typing import Any, Self

from data_pipeline.durable import fsync_descriptor

BUFFER_BYTES = 4 << 20
_BLOCK_BYTES = 4096  # in practice no disk has larger blocks, and no file system larger pages
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectWriter:
    """A new file that is written from start to end."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # mmap aligns it to a page
        self._filled = 0
        self._descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, content: bytes | memoryview) -> None:
        """Append `content`; it may stay in the buffer until `flush`. Raises OSError."""
        left = memoryview(content).cast("B")
        self.size += len(left)
        while len(left):
            count = min(len(left), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def flush(self) -> None:
        """Hand everything to the operating system; nothing can be appended afterwards."""
        whole = self._filled - self._filled % _BLOCK_BYTES
        rest = bytes(self._buffer[whole : self._filled])
        self._filled = whole
        self._flush()
        if rest:  # less than a block cannot bypass the cache
            _through_the_cache(self._descriptor)
            os.write(self._descriptor, rest)

    def sync(self) -> None:
        """Wait until the content is on the disk."""
        fsync_descriptor(self._descriptor)

    def _flush(self) -> None:
        at = 0
        while at < self._filled:
            try:
                at += os.write(self._descriptor, self._buffer[at : self._filled])
            except OSError as error:
                if error.errno not in _REFUSALS or not _through_the_cache(self._descriptor):
                    raise
        self._filled = 0


class DirectReader(io.RawIOBase):
    """A file that is read from the disk, in large blocks."""

    def __init__(self, path: Path) -> None:
        self._position = 0
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._descriptor = _open(path, os.O_RDONLY)

    def close(self) -> None:
        """See RawIOBase."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        """See RawIOBase."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to byte `offset` from the start of the file."""
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def readinto(self, target: Any) -> int:
        """Fill `target` as far as the file reaches; the number of bytes read. Raises OSError."""
        view = memoryview(target).cast("B")
        done = 0
        while done < len(view):
            within = self._position % _BLOCK_BYTES
            wanted = within + len(view) - done
            count = min(BUFFER_BYTES, wanted + -wanted % _BLOCK_BYTES)
            found = self._read(count, self._position - within) - within
            if found <= 0:
                break
            found = min(found, len(view) - done)
            view[done : done + found] = self._buffer[within : within + found]
            done += found
            self._position += found
        return done

    def _read(self, count: int, start: int) -> int:
        try:
            return os.preadv(self._descriptor, [self._buffer[:count]], start)
        except OSError as error:
            if error.errno not in _REFUSALS or not _through_the_cache(self._descriptor):
                raise
            return self._read(count, start)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return os.open(path, flags, 0o644)


def _through_the_cache(descriptor: int) -> bool:
    """Turn off direct access to an open file; whether it was on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
