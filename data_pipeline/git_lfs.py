"""Recognises the pointers that git leaves in place of large files when git-lfs did not fetch them."""

from pathlib import Path

from data_pipeline.errors import DataError

_FIRST_BYTES = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether the file at `path` is a git-lfs pointer."""
    with path.open("rb") as file:
        return file.read(len(_FIRST_BYTES)) == _FIRST_BYTES


def require_no_pointer(path: Path) -> None:
    """Raises DataError if the file at `path` is a git-lfs pointer or cannot be read."""
    try:
        if is_pointer(path):
            raise DataError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
