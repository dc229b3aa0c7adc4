"""A path as somebody types it, as it is stored: absolute, against the folder that the command is given in."""

from pathlib import Path


def absolute(path: str | Path) -> Path:
    """`path` against the caller's folder, with `~` expanded and no `..` left.

    Symbolic links stay as they are, since other machines may know the folder by that name alone; but what is
    above a link is for the file system to say, so a path with `..` is resolved.
    """
    whole = Path(path).expanduser().absolute()
    return whole.resolve() if ".." in whole.parts else whole
