"""Access to files in object stores through fsspec: `s3://`, `gs://`, `hf://` and its other protocols.

Credentials and endpoints come from the store's own environment variables and configuration files. A size and
a version (an ETag, for example) identify a file; opening a file that has changed since it was listed raises
an error. The libraries of the stores share no base class of exceptions, so each failure is converted to a
DataError or a ConfigError here.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.places import url_problem, without_credentials

# Bytes per request: large enough that latency does not dominate, small compared with a chunk.
REQUEST_BYTES = 4 << 20
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs"}  # the extra of outlast that installs each protocol
# The keys under which S3, GCS, the Hugging Face hub and other stores report a file's version.
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "mtime", "updated")


class RemoteFile(NamedTuple):
    """A file in an object store. `name` is its path relative to the parent of what the user named."""

    url: str
    name: str
    size_bytes: int
    version: str


def is_remote(source: str) -> bool:
    """Whether `source` is a URL."""
    return "://" in source


def find_store(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system for `url`, and the path in it. Raises ConfigError if fsspec has none.

    A URL with credentials in it is refused, because it is written to configs and manifests.
    """
    from fsspec.core import url_to_fs

    if (problem := url_problem(url)) is not None:
        raise ConfigError(f"{without_credentials(url)}: {problem}.")
    protocol = url.partition("://")[0]
    try:
        found: tuple[Any, str] = url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'outlast[{extra}]'" if extra else "install the package that fsspec needs"
        raise ConfigError(f"{url}: {error}. To read {protocol}://, {remedy}") from None
    except Exception as error:  # the stores' errors share no base class
        raise ConfigError(f"{url}: {in_words(error)}") from error
    return found


def list_remote(source: str) -> list[RemoteFile]:
    """The files that a URL names, sorted by name: one file, all files below a folder, or a glob's matches.

    Hidden files are left out. Raises ConfigError if the store cannot list them.
    """
    import fsspec

    store, path = find_store(source)
    try:
        if fsspec.core.has_magic(path) and not store.exists(path):  # a key may contain such characters
            found = store.glob(path, detail=True)
            fixed = PurePosixPath(path[: min(path.index(sign) for sign in "*?[" if sign in path)])
            base = fixed if path[len(str(fixed))] == "/" else fixed.parent
        elif store.isdir(path):
            found, base = store.find(path, detail=True), PurePosixPath(path).parent
        else:
            found, base = {path: store.info(path)}, PurePosixPath(path).parent
    except FileNotFoundError:
        return []
    except Exception as error:  # the stores' errors share no base class
        raise ConfigError(f"{source}: cannot list it: {in_words(error)}") from error
    files = []
    for name, info in sorted(cast(Mapping[str, Any], found).items()):
        below = PurePosixPath(name).relative_to(base)
        if info["type"] == "file" and not any(part.startswith(".") for part in below.parts):
            url = str(store.unstrip_protocol(name))
            files.append(RemoteFile(url, below.as_posix(), int(info["size"]), _version(info)))
    return files


def open_remote(url: str, version: str) -> BinaryIO:
    """Opens the seekable file at `url`. Raises DataError if it cannot be read or is not of that `version`."""
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url, use_listings_cache=False)
        store.invalidate_cache()  # the hub's file system caches a file's details regardless
        found = _version(store.info(path))
        if found != version:
            raise DataError(f"{url}: it has changed since it was listed; run again to start it over")
        return cast(BinaryIO, store.open(path, "rb", block_size=REQUEST_BYTES, cache_type="readahead"))
    except DataError:
        raise
    except Exception as error:  # the stores' errors share no base class
        raise unreadable(url, error) from error


def unreadable(url: str, error: Exception) -> DataError:
    """The error for a read that failed."""
    return DataError(
        f"{url}: reading failed: {in_words(error)}. Finished work is kept; run again to continue"
    )


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def in_words(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__} {(str(error).splitlines() or [''])[0]}".rstrip()
