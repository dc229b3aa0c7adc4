"""How a path that a user types is checked and stored: absolute, relative to the directory of the command."""

import os
import re
import shutil
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.places import PATH_BYTES, path_problem, shown

# What a run's files add to the path of its directory: a module in code/, a tensor file of a checkpoint.
_DEEPEST_BYTES = 255
_MEANINGS = {
    "%": "Slurm and submitit replace it in the names of files",
    ":": "it separates the folders in PYTHONPATH and in a container's mounts",
    "\\": "Slurm reads it as an escape",
    "?": "it ends the path in the URI of MLflow's database",
    "#": "it ends the path in the URI of MLflow's database",
}


def absolute(path: str | Path, what: str = "") -> Path:
    """`path` resolved against the caller's directory, with `~` expanded and no `..` left.

    Symbolic links stay, because other machines may know the folder only by that name. A path with `..` is
    resolved, because only the file system knows the parent of a linked folder. Raises ConfigError for a path
    that no file can have; `what` names the option or field that holds it.
    """
    try:
        whole = usable_path(path, what).expanduser().absolute()
        return usable_path(whole.resolve() if ".." in whole.parts else whole, what)
    except (OSError, RuntimeError) as error:  # no current directory, a loop of links, no such user
        problem = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise ConfigError(f"{_named(path, what)}: {problem}.") from None


def usable_path(path: str | Path, what: str = "") -> Path:
    """`path` as it is, for a file or folder that is only read. Raises ConfigError like `absolute`."""
    if (problem := path_problem(path)) is not None:
        raise ConfigError(f"{_named(path, what)}: {problem}.")
    return Path(path)


def _named(path: str | Path, what: str) -> str:
    return f"{what}{' ' if what.startswith('--') else ' = '}{shown(path)}" if what else shown(path)


def new_folder_problem(folder: Path) -> str | None:
    """Why a run directory cannot be created at the absolute path `folder`, apart from what is there already.

    Its path reaches batch scripts, PYTHONPATH, containers and the URI of MLflow's database, where some
    characters have a meaning.
    """
    if (problem := path_problem(folder)) is not None:
        return f"{shown(folder)}: {problem}."
    for character, meaning in _MEANINGS.items():
        if character in str(folder):
            return f"{shown(folder)}: a run directory's path cannot have {character!r}: {meaning}."
    if len(os.fsencode(folder)) > PATH_BYTES - _DEEPEST_BYTES:
        return (
            f"{shown(folder)}: the path has {len(os.fsencode(folder))} bytes, and the files of a run need up "
            f"to {_DEEPEST_BYTES} more; a path has at most {PATH_BYTES}. Use a shorter one."
        )
    return unwritable_problem(folder)


def moved_folder_problem(folder: Path) -> str | None:
    """Why a run cannot continue where its directory is now: the rules that would make it run other code."""
    if re.search(r":|%[0-9]*[A-Za-z%]", str(folder)) is None:
        return None
    character = ":" if ":" in str(folder) else "%"
    return (
        f"{shown(folder)}: a run directory's path cannot have {character!r}: {_MEANINGS[character]}. Move "
        "the run directory, or name it by a link without one."
    )


def unwritable_problem(folder: Path) -> str | None:
    """Why nothing can be created at the absolute path `folder`, apart from what is there already."""
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {place.readlink()}, which leads nowhere. Remove or mend the link."
    parent = nearest_existing(folder)
    if not parent.is_dir():
        return f"{parent} is a file, so nothing can be created below it."
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"you cannot write to {parent}."
    if shutil.disk_usage(parent).total == 0:  # /proc, /sys
        return f"{parent} is on a file system that holds no files of users."
    return None


def nearest_existing(path: Path) -> Path:
    """`path`, or its closest parent folder that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
