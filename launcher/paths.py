"""How a path that a user types is stored: absolute, relative to the directory of the command."""

from pathlib import Path


def absolute(path: str | Path) -> Path:
    """`path` resolved against the caller's directory, with `~` expanded and no `..` left.

    Symbolic links stay, because other machines may know the folder only by that name. A path with `..` is
    resolved, because only the file system knows the parent of a linked folder.
    """
    whole = Path(path).expanduser().absolute()
    return whole.resolve() if ".." in whole.parts else whole
