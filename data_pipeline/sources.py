"""Which files a user's sources name: files, folders, globs.

Refused: files over a network, a file of a kind that is not read here when it is named itself, and the same
file twice.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """One input file; `name` is its path below what the user named, and is what gets recorded."""

    name: str
    path: Path
    size_bytes: int
    mtime_ns: int

    @property
    def suffix(self) -> str:
        """The suffix in SUFFIXES, or nothing."""
        return _suffix(self.path)

    @property
    def is_divisible(self) -> bool:
        """Whether reading may start anywhere: true for plain lines and tables, false for compressed files."""
        return self.suffix in (".jsonl", ".parquet")

    @property
    def units(self) -> int:
        """What spans count: bytes."""
        return self.size_bytes

    @property
    def unit(self) -> str:
        """What is counted in `units`."""
        return "bytes"

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What changes when the file does."""
        return (str(self.path), self.name, self.size_bytes, self.mtime_ns)


def find_files(sources: Sequence[str | Path]) -> tuple[list[SourceFile], int]:
    """The files that `sources` (files, folders, globs) name, in a stable order, and how many were ignored.

    Folders are searched to the bottom; files in them with other suffixes, and hidden ones, are ignored.
    Raises ConfigError that lists every source that names nothing readable.
    """
    problems: list[str] = []
    found: list[SourceFile] = []
    ignored = 0
    for source in (str(source) for source in sources):
        if "://" in source:
            problems.append(f"{source}: only local files are read; copy it here first")
            continue
        paths, base, passed_over = _matches(source)
        ignored += passed_over
        if not paths:
            problems.append(_nothing_found(source))
        for path in paths:
            if not _suffix(path):
                problems.append(f"{path}: not a kind of file that is read here ({', '.join(SUFFIXES)})")
            elif not os.access(path, os.R_OK):
                problems.append(f"{path}: not allowed to read it")
            else:
                state = path.stat()
                name = path.relative_to(base).as_posix()
                found.append(SourceFile(name, path.resolve(), state.st_size, state.st_mtime_ns))
    seen: set[Path] = set()
    for file in found:
        if file.path in seen:
            problems.append(f"{file.path} is named by two sources; name it once")
        seen.add(file.path)
    if problems:
        raise ConfigError(problems)
    return found, ignored


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
        return f"{source}: the folder holds no file that is read here ({', '.join(SUFFIXES)})"
    return f"{source}: no such file or folder"


def _suffix(path: Path) -> str:
    return max((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), key=len, default="")
