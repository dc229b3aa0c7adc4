"""Files in object stores, `s3://`, `gs://`, `hf://` and whatever else fsspec knows, as sources of documents.

Credentials and addresses are the store's own affair (environment, configuration files). A file is told by its
size and by what the store says changes with it, and opening one that has changed since it was listed is an
error. Every failure of a store reaches the user as an error of ours: their libraries share no base class.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from data_pipeline.errors import ConfigError, DataError

# Read at a time: large enough that a round trip does not decide, small beside a chunk.
_BLOCK_BYTES = 4 << 20
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs"}  # what `pip install outlast[…]` brings, by protocol
# Where the stores say what changes with a file: S3, GCS, the Hugging Face hub, others.
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "mtime", "updated")


class RemoteFile(NamedTuple):
    """A file of an object store: its URL, its path below what the user named, its size and version."""

    url: str
    name: str
    size_bytes: int
    version: str


def is_remote(source: str) -> bool:
    """Whether `source` is an URL."""
    return "://" in source


def find_store(url: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system for `url` and the path there. Raises ConfigError where it has none."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        found: tuple[Any, str] = url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'outlast[{extra}]'" if extra else "install what fsspec needs for it"
        raise ConfigError(f"{url}: {error}. For {protocol}:// {remedy}") from None
    except Exception as error:  # of any library
        raise ConfigError(f"{url}: {in_words(error)}") from error
    return found


def list_remote(source: str) -> list[RemoteFile]:
    """The files that a URL names: one, all below a folder, or those that match a glob, by name.

    Raises ConfigError where the store cannot be asked. Hidden files are left out.
    """
    import fsspec

    store, path = find_store(source)
    try:
        if fsspec.core.has_magic(path):
            found = store.glob(path, detail=True)
            fixed = PurePosixPath(path[: min(path.index(sign) for sign in "*?[" if sign in path)])
            base = fixed if path[len(str(fixed))] == "/" else fixed.parent
        elif store.isdir(path):
            found, base = store.find(path, detail=True), PurePosixPath(path).parent
        else:
            found, base = {path: store.info(path)}, PurePosixPath(path).parent
    except FileNotFoundError:
        return []
    except Exception as error:  # of any library
        raise ConfigError(f"{source}: cannot be listed: {in_words(error)}") from error
    files = []
    for name, info in sorted(cast(Mapping[str, Any], found).items()):
        below = PurePosixPath(name).relative_to(base)
        if info["type"] == "file" and not any(part.startswith(".") for part in below.parts):
            url = str(store.unstrip_protocol(name))
            files.append(RemoteFile(url, below.as_posix(), int(info["size"]), _version(info)))
    return files


def open_remote(url: str, version: str) -> BinaryIO:
    """The file at `url`, seekable. Raises DataError where it is not to be had or not of that `version`."""
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url, use_listings_cache=False)
        store.invalidate_cache()  # the hub's keeps what it has seen of a file all the same
        found = _version(store.info(path))
        if found != version:
            raise DataError(f"{url}: it has changed since it was listed; run again to begin it anew")
        return cast(BinaryIO, store.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead"))
    except DataError:
        raise
    except Exception as error:  # of any library
        raise unreadable(url, error) from error


def unreadable(url: str, error: Exception) -> DataError:
    """What the user is told of a read that failed."""
    return DataError(
        f"{url}: reading failed: {in_words(error)}. What is finished stays; run again to continue"
    )


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def in_words(error: Exception) -> str:
    """What any library's error says, in one line."""
    return f"{type(error).__name__} {(str(error).splitlines() or [''])[0]}".rstrip()
