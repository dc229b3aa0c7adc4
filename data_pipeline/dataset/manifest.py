"""manifest.json, the commit record of a data directory: a folder without one is not a data set.

It names only files of its own folder and does not contain the folder's path, so a data set can be moved and
copied. Its first line is a checksum of the rest. Reading it needs only the standard library.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_pipeline.dataset.megatron_index import ITEM_BYTES
from data_pipeline.errors import DataError

FILE_NAME = "manifest.json"
ENCODING_FILE = "encoding.json"
FORMAT = 1
# A .sum file lists a checksum for each block of this many bytes; its JSON key is `chunk_bytes`.
BLOCK_BYTES = 1 << 22

_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEX = re.compile(r"[0-9a-f]+")

Split = Literal["train", "val"]


@dataclass(frozen=True)
class FileRecord:
    """The size and the xxh3_128 checksum of one file."""

    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Shard:
    """A .bin/.idx pair, and the .sum file with the checksums of their blocks."""

    name: str
    tokens: int
    documents: int
    bin: FileRecord
    idx: FileRecord
    sum: FileRecord

    @property
    def files(self) -> dict[str, FileRecord]:
        """The record of each file of the shard, by file name."""
        return {f"{self.name}.{kind}": getattr(self, kind) for kind in ("bin", "idx", "sum")}


@dataclass(frozen=True)
class EncodingRecord:
    """The encoding that made the ids, and the size and checksum of encoding.json."""

    name: str
    fingerprint: str
    vocab_size: int
    end_of_text: int
    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The content of a data directory.

    `sources` lists each input with its size and the checksums of the ranges that were read. `preparation`
    contains the settings that determined the ids, `skipped` the number of documents left out by reason, and
    `versions` the versions of the software.
    """

    dtype: str
    encoding: EncodingRecord
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    skipped: Mapping[str, int]
    preparation: Mapping[str, Any]
    versions: Mapping[str, str]
    sources: tuple[Mapping[str, Any], ...]

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in reading order."""
        return self.train if split == "train" else self.val

    @property
    def train_tokens(self) -> int:
        """The number of tokens of the training split."""
        return sum(shard.tokens for shard in self.train)

    @property
    def val_tokens(self) -> int:
        """The number of tokens of the validation split."""
        return sum(shard.tokens for shard in self.val)

    @property
    def documents(self) -> int:
        """The number of documents of both splits."""
        return sum(shard.documents for shard in (*self.train, *self.val))

    @property
    def is_ended_by_token(self) -> bool:
        """Whether end-of-text ends every document and occurs nowhere else, as in what `prepare` writes."""
        return "pipeline" in self.preparation or bool(self.preparation.get("is_ended_by_token"))

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of what training reads: the encoding, the dtype, the shards and their order."""
        content = [self.encoding.fingerprint, self.dtype]
        for split, shards in (("train", self.train), ("val", self.val)):
            content += [f"{split} {s.tokens} {s.bin.xxh3_128} {s.idx.xxh3_128}" for s in shards]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of manifest.json. Equal manifests have equal bytes."""
        rest = (
            json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)[2:] + "\n"
        ).encode()
        return b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def is_shard_name(name: str) -> bool:
    """Whether a manifest may give a shard this name."""
    return _NAME.fullmatch(name) is not None


def joint_fingerprint(manifests: Iterable[Manifest]) -> str:
    """Identifies the data of a run that reads these data sets in this order."""
    return "+".join(manifest.fingerprint for manifest in manifests)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the data directory `folder`, checked against its own checksum.

    Raises DataError if it is missing, damaged, of another format, or names files outside its folder. Does not
    look at the shards.
    """
    path = folder / FILE_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "no such folder" if not folder.exists() else f"it has no {FILE_NAME}"
        raise DataError(f"{folder} is not a data set, or its preparation is unfinished: {what}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    first_line = _FIRST_LINE.match(raw)
    if first_line is None:
        raise DataError(f"{path}: not a manifest: the first line must contain the checksum of the rest")
    if hashlib.sha256(raw[first_line.end() :]).hexdigest().encode() != first_line[1]:
        raise DataError(f"{path}: its checksum does not match: it is damaged or was edited")
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']!r}; this version reads format {FORMAT}")
        return _from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: malformed: {type(error).__name__} {error}") from None


def _from_json(content: Any) -> Manifest:
    dtype = content["dtype"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r}")
    encoding = EncodingRecord(**content["encoding"])
    _require_counts(encoding.vocab_size, encoding.end_of_text, encoding.size_bytes)
    _require_hex(encoding.fingerprint, encoding.xxh3_128)
    if not isinstance(encoding.name, str):
        raise ValueError(f"encoding name {encoding.name!r}")
    manifest = Manifest(
        dtype=dtype,
        encoding=encoding,
        train=tuple(shard_from_json(shard) for shard in content["train"]),
        val=tuple(shard_from_json(shard) for shard in content["val"]),
        skipped=dict(content["skipped"]),
        preparation=dict(content["preparation"]),
        versions=dict(content["versions"]),
        sources=tuple(content["sources"]),
    )
    shards = (*manifest.train, *manifest.val)
    for shard in shards:
        if shard.bin.size_bytes != shard.tokens * ITEM_BYTES[dtype]:
            raise ValueError(f"{shard.name}: {shard.tokens} tokens do not take {shard.bin.size_bytes} bytes")
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        raise ValueError("two shards have the same name")
    return manifest


def shard_from_json(content: Any) -> Shard:
    """The shard that `asdict` converted to `content`. Raises ValueError, KeyError or TypeError otherwise."""
    records = {kind: _record(content[kind]) for kind in ("bin", "idx", "sum")}
    shard = Shard(content["name"], content["tokens"], content["documents"], **records)
    _require_counts(shard.tokens, shard.documents)
    if not isinstance(shard.name, str) or not is_shard_name(shard.name):
        raise ValueError(f"shard name {shard.name!r} is not a plain file name")
    return shard


def _record(content: Any) -> FileRecord:
    record = FileRecord(**content)
    _require_counts(record.size_bytes)
    _require_hex(record.xxh3_128)
    return record


def _require_counts(*values: object) -> None:
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise ValueError(f"{value!r} is not a count")


def _require_hex(*values: object) -> None:
    for value in values:
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise ValueError(f"checksum {value!r}")
