"""Finds the files that a user's sources name: files, folders and globs, local or in an object store.

A file of an unsupported kind is refused when the user names it, and so is a file that two sources name. A
file of a folder that is not read is reported by its name.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.git_lfs import is_pointer
from data_pipeline.remote import is_remote, list_remote, open_remote, unreadable

_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_SUPPORTED = (
    f"(supported: {', '.join(_KINDS)}; all but .parquet and .arrow also with {', '.join(_COMPRESSIONS)})"
)
_BLOCK_BYTES = 1 << 20
_SAVED = ("dataset_dict.json", "state.json")  # the files that `save_to_disk` of `datasets` writes
# JSON files that describe a data set and contain no documents.
_DESCRIPTIONS = (*_SAVED, "dataset_info.json", "dataset_infos.json")
_MOST_NAMED = 5


@dataclass(frozen=True)
class SourceFile:
    """One input file. The manifest records `name`, the path relative to the parent of what the user named."""

    name: str
    location: str  # the absolute path by which the user named it, or a URL
    size_bytes: int
    version: int | str  # changes when the file does: its modification time, or the store's version

    @property
    def kind(self) -> str:
        """The kind of the content: lines, json, text, csv, tsv, parquet, arrow; empty if unsupported."""
        return _format(self.location)[0]

    @property
    def compression(self) -> str:
        """The suffix of the compression, or an empty string."""
        return _format(self.location)[1]

    @property
    def is_remote(self) -> bool:
        """Whether the file is in an object store."""
        return is_remote(self.location)

    @property
    def is_divisible(self) -> bool:
        """Whether reading may start anywhere: true for plain lines and tables, false for compressed files."""
        return self.kind == "parquet" or (self.kind == "lines" and not self.compression)

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

    @contextmanager
    def require_unchanged(self) -> Iterator[None]:
        """Raises DataError before and after the block if a local file differs from the one that was found."""
        if self.is_remote:  # the store compares the version when the file is opened
            yield
            return
        inode = self._require_unchanged()
        yield
        self._require_unchanged(inode)

    def _require_unchanged(self, inode: int | None = None) -> int:
        try:
            now = Path(self.location).stat()
        except OSError as error:
            raise DataError(
                f"{self.location}: it cannot be read any more: {error.strerror}. Finished work is kept; "
                f"restore it and run again"
            ) from None
        # An inode number is the same for one process only: some network file systems number files anew.
        if (now.st_size, now.st_mtime_ns) != (self.size_bytes, self.version) or inode not in (
            None,
            now.st_ino,
        ):
            raise DataError(
                f"{self.location}: it changed while it was being prepared (it had {self.size_bytes:,} bytes, "
                f"now {now.st_size:,}). Run again when nothing writes to it; finished work on other files is "
                f"kept"
            )
        return now.st_ino

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


def find_files(sources: Sequence[str | Path]) -> tuple[list[SourceFile], list[str]]:
    """The files that `sources` (files, folders, globs) name, in a stable order, and the names ignored.

    Folders are searched recursively, through links too, but no folder twice. Hidden files in them are left
    out; files of other kinds are ignored. Raises ConfigError that lists every source that names no readable
    file, and every file or folder that cannot be read.
    """
    search = _Search()
    for source in (str(source) for source in sources):
        if is_remote(source):
            search.add_remote(source)
        else:
            search.add_local(source)
    search.require_distinct()
    if search.problems:
        raise ConfigError(search.problems)
    return search.found, search.ignored


def describe_ignored(ignored: Sequence[str]) -> str:
    """A sentence that names the ignored files."""
    more = len(ignored) - _MOST_NAMED
    names = ", ".join(ignored[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
    return f"ignoring {len(ignored)} files of unsupported kinds in the folders: {names}"


@dataclass
class _Search:
    """Collects the files of all sources, the names ignored, and the problems."""

    found: list[SourceFile] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add_remote(self, source: str) -> None:
        try:
            files = list_remote(source)
        except ConfigError as error:
            self.problems += error.problems
            return
        known = [SourceFile(*file) for file in ((f.name, f.url, f.size_bytes, f.version) for f in files)]
        known = [file for file in known if _is_read(file.location)]
        if not known:
            what = f"none of the {len(files)} files there is supported" if files else "no such file or folder"
            self.problems.append(f"{source}: {what} {_SUPPORTED}")
        self.ignored += [file.name for file in files if not _is_read(file.url)]
        self.found += known

    def add_local(self, source: str) -> None:
        path = Path(source)
        before = len(self.problems)
        if path.is_dir():
            if any((path / name).exists() for name in _SAVED):
                self.problems.append(
                    f"{shown(path)} was written by save_to_disk of the package datasets: name it in a "
                    f'[[datasets]] table of DATA.toml instead, as name = "{shown(path)}"'
                )
                return
            paths, base = self._walk([path]), path.parent
        elif os.path.lexists(path):
            paths, base = [path], path.parent
        else:
            paths, base = self._glob(source)
        if not paths and len(self.problems) == before:
            self.problems.append(_nothing_found(source))
        real: set[str] = set()
        for one in paths:
            if (name := _place(one)) not in real:  # a loop of links leads to one file under many names
                real.add(name)
                self._add(one, base)

    def _glob(self, source: str) -> tuple[list[Path], Path]:
        """The files that a pattern matches, and those in folders that it matches; and the part before it."""
        fixed, pattern = _split_pattern(source)
        if not glob.has_magic(pattern):
            return [], fixed
        found = glob.glob(glob.escape(str(fixed)) + "/" + pattern, recursive=True)  # noqa: PTH207 (any root)
        if not Path(source).is_absolute():
            found = [os.path.relpath(name) if str(fixed) == "." else name for name in found]
        matches = sorted((Path(name) for name in found), key=lambda path: (len(path.parts), path))
        folders = [path for path in matches if path.is_dir()]
        files = [path for path in matches if not path.is_dir()]
        if pattern.rpartition("/")[2] == "**":
            folders = []  # `**` has matched everything below them already
        known = dict.fromkeys(files)
        known.update(dict.fromkeys(self._walk(folders)))
        return sorted(known), fixed

    def _walk(self, folders: Sequence[Path]) -> list[Path]:
        """The files of `folders` that are read, sorted. Links to folders are followed last."""
        known: list[Path] = []
        seen: set[tuple[int, int]] = set()
        waiting, links = list(folders), list[Path]()
        while waiting or links:
            folder = waiting.pop() if waiting else links.pop(0)
            try:
                state = folder.stat()
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append(f"{shown(folder)}: the folder cannot be read: {error.strerror}")
                continue
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if path.is_dir():
                    (links if entry.is_symlink() else waiting).append(path)
                elif _is_read(entry.name):
                    known.append(path)
                else:
                    self.ignored.append(shown(path))
        return sorted(known)

    def _add(self, path: Path, base: Path) -> None:
        problem = _problem(path)
        if problem is not None:
            self.problems.append(f"{shown(path)}{problem}")
            return
        state = path.stat()
        name = path.relative_to(base).as_posix()
        self.found.append(SourceFile(name, str(path.absolute()), state.st_size, state.st_mtime_ns))

    def require_distinct(self) -> None:
        """Adds a problem for each file that two sources name."""
        named = {_place(Path(file.location)) for file in self.found if not file.is_remote}
        seen: set[str] = set()
        for file in self.found:
            place = file.location if file.is_remote else _place(Path(file.location))
            if place in seen:
                self.problems.append(f"{file.location} is named by two sources; name it once")
            seen.add(place)
            if not file.is_remote:
                target = str(Path(file.location).resolve())
                if target != place and target in named:
                    self.problems.append(f"{file.location} is a link to {target}, which is named too")


def shown(path: Path) -> str:
    """The path for a message; bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _place(path: Path) -> str:
    """The path with the links of its folders resolved. Two names for one file remain two files."""
    return str(path.absolute().parent.resolve() / path.name)


def _problem(path: Path) -> str | None:
    """What prevents the file from being read, to be appended to its path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return ": its name is not valid UTF-8, so the manifest cannot name it. Rename it"
    if not _format(path.name)[0]:
        return f": this kind of file is not supported {_SUPPORTED}"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f" is a link to {shown(path.readlink())}, which leads to no file ({error.strerror})"
        return f": {error.strerror}"
    if not stat.S_ISREG(mode):
        return " is not a regular file (a pipe, a socket or a device); write its content to a file first"
    try:
        return (
            " is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"
            if is_pointer(path)
            else None
        )
    except PermissionError:
        return ": you have no permission to read it"
    except OSError as error:
        return f": cannot be read: {error.strerror}"


def _split_pattern(source: str) -> tuple[Path, str]:
    """The folder of a glob pattern, and the pattern in it. A part that exists as it is written is literal."""
    parts = Path(source).parts
    fixed = Path(parts[0]) if Path(source).is_absolute() else Path()
    rest = list(parts[1:] if Path(source).is_absolute() else parts)
    while len(rest) > 1 and (not glob.has_magic(rest[0]) or (fixed / rest[0]).is_dir()):
        fixed /= rest.pop(0)
    return fixed, "/".join(rest)


def _nothing_found(source: str) -> str:
    if Path(source).is_dir():
        return f"{source}: the folder contains no supported file {_SUPPORTED}"
    if glob.has_magic(source):
        return f"{source}: no file matches"
    return f"{source}: no such file or folder"


def _is_read(name: str) -> bool:
    """Whether a file of a folder is read: it is of a supported kind, and no description of a data set."""
    return bool(_format(name)[0]) and name.rpartition("/")[2] not in _DESCRIPTIONS


def _format(name: str) -> tuple[str, str]:
    """The kind and the compression of a file, by its name; the kind is empty if it is not supported."""
    stem = name.lower()
    compression = next((suffix for suffix in _COMPRESSIONS if stem.endswith(suffix)), "")
    kind = next((k for suffix, k in _KINDS.items() if stem.removesuffix(compression).endswith(suffix)), "")
    return ("", "") if compression and kind in ("parquet", "arrow") else (kind, compression)
