"""Finds the files that a user's sources name: files, folders and globs, local or in an object store.

A file of an unsupported kind is refused when the user names it, and so is a file that two sources name.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import ConfigError
from data_pipeline.remote import is_remote, list_remote, open_remote, unreadable

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
_SUPPORTED = f"(supported: {', '.join(SUFFIXES)})"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One input file. The manifest records `name`, the path relative to the parent of what the user named."""

    name: str
    location: str  # an absolute path or a URL
    size_bytes: int
    version: int | str  # changes when the file does: its modification time, or the store's version

    @property
    def suffix(self) -> str:
        """The file's suffix if SUFFIXES contains it, else an empty string."""
        return _suffix(self.location)

    @property
    def is_remote(self) -> bool:
        """Whether the file is in an object store."""
        return is_remote(self.location)

    @property
    def is_divisible(self) -> bool:
        """Whether reading may start anywhere: true for plain lines and tables, false for compressed files."""
        return self.suffix in (".jsonl", ".parquet")

    @property
    def units(self) -> int:
        """The number of units that spans count: bytes."""
        return self.size_bytes

    @property
    def unit(self) -> str:
        """The name of a unit."""
        return "bytes"

    @property
    def identity(self) -> tuple[str | int, ...]:
        """Values that change when the file does."""
        return (self.location, self.name, self.size_bytes, self.version)

    def open(self) -> BinaryIO:
        """Open the file for reading; it is seekable."""
        if self.is_remote:
            return open_remote(self.location, str(self.version))
        return Path(self.location).open("rb")

    def read_blocks(self, start: int = 0) -> Iterator[bytes]:
        """Yields the file's content from byte `start` onwards. Raises DataError if an object store fails."""
        with self.open() as file:
            file.seek(start)
            while block := self._read_block(file):
                yield block

    def _read_block(self, file: BinaryIO) -> bytes:
        try:
            return file.read(_BLOCK_BYTES)
        except Exception as error:
            if self.is_remote:
                raise unreadable(self.location, error) from error
            raise


def find_files(sources: Sequence[str | Path]) -> tuple[list[SourceFile], int]:
    """The files that `sources` (files, folders, globs) name, in a stable order, and the number ignored.

    Folders are searched recursively. Hidden files in them and files with other suffixes are ignored. Raises
    ConfigError that lists every source that names no readable file.
    """
    problems: list[str] = []
    found: list[SourceFile] = []
    ignored = 0
    for source in (str(source) for source in sources):
        if is_remote(source):
            try:
                files, unsupported = _remote(source)
            except ConfigError as error:
                problems += error.problems
                continue
            ignored += unsupported
            found += files
            continue
        paths, base, unsupported = _matches(source)
        ignored += unsupported
        if not paths:
            problems.append(_nothing_found(source))
        for path in paths:
            if not _suffix(path):
                problems.append(
                    f"{path}: this kind of file is not supported (supported: {', '.join(SUFFIXES)})"
                )
            elif not os.access(path, os.R_OK):
                problems.append(f"{path}: you have no permission to read it")
            else:
                state = path.stat()
                name = path.relative_to(base).as_posix()
                found.append(SourceFile(name, str(path.resolve()), state.st_size, state.st_mtime_ns))
    seen: set[str] = set()
    for file in found:
        if file.location in seen:
            problems.append(f"{file.location} is named by two sources; name it once")
        seen.add(file.location)
    if problems:
        raise ConfigError(problems)
    return found, ignored


def _remote(source: str) -> tuple[list[SourceFile], int]:
    files = list_remote(source)
    known = [SourceFile(name, url, size, version) for url, name, size, version in files if _suffix(url)]
    if not known:
        what = f"none of the {len(files)} files there is supported" if files else "no such file or folder"
        raise ConfigError(f"{source}: {what} {_SUPPORTED}")
    return known, len(files) - len(known)


def _matches(source: str) -> tuple[list[Path], Path, int]:
    path = Path(source)
    if path.is_dir():
        files = [
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if not any(part.startswith(".") for part in Path(folder, name).relative_to(path).parts)
        ]
        known = sorted(file for file in files if _suffix(file))
        return known, path.parent, len(files) - len(known)
    if path.exists():
        return [path], path.parent, 0
    if not glob.has_magic(source):
        return [], path.parent, 0
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    files = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207 (any root)
    files = [file for file in files if file.is_file()]
    return sorted(files), Path(*fixed), 0


def _nothing_found(source: str) -> str:
    if glob.has_magic(source):
        return f"{source}: no file matches"
    if Path(source).is_dir():
        return f"{source}: the folder contains no supported file {_SUPPORTED}"
    return f"{source}: no such file or folder"


def _suffix(path: Path | str) -> str:
    return max((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), key=len, default="")
