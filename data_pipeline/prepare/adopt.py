"""Makes a data set of token shards that Megatron's tools wrote.

The .bin and .idx files stay unchanged and where they are. `adopt` writes .sum files, encoding.json and, last,
the manifest next to them. It refuses files that their index does not describe, and ids that the tokenizer
does not have.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import (
    BLOCK_BYTES,
    ENCODING_FILE,
    FILE_NAME,
    FileRecord,
    Manifest,
    Shard,
    is_shard_name,
)
from data_pipeline.dataset.megatron_index import ITEM_BYTES, read_header
from data_pipeline.dataset.shards import IndexArrays, sums_content
from data_pipeline.durable import require_writable, write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.finalize import encoding_record
from data_pipeline.sources.files import shown
from data_pipeline.tokenizer.encoding import Encoding, load_encoding


def adopt(
    train: Sequence[str],
    val: Sequence[str],
    tokenizer: str,
    tokenizer_pattern: str | None = None,
    end_of_text: str | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[Path, Manifest]:
    """The folder and the new manifest of the shards with these path prefixes (Megatron's names for them).

    `warn` is called with each warning for the user. Raises ConfigError with every prefix that names no shard;
    DataError for files that their index does not describe and for ids outside the vocabulary.
    """
    encoding = load_encoding(tokenizer, tokenizer_pattern, end_of_text)
    paths = [Path(prefix.removesuffix(".bin").removesuffix(".idx")).absolute() for prefix in (*train, *val)]
    folder = _common_folder(paths)
    dtypes = {path.name: read_header(path.with_name(f"{path.name}.idx")).dtype for path in paths}
    if len(set(dtypes.values())) > 1:
        kinds = ", ".join(f"{name} has {dtype}" for name, dtype in dtypes.items())
        raise ConfigError(
            f"all shards of a data set must have the same dtype, but {kinds}. Adopt them as several data sets"
        )
    require_writable(folder)  # reading the shards may take hours
    adopted = [_adopt_shard(path, dtypes[path.name], encoding) for path in paths]
    unended = sum(one.unended_documents for one in adopted)
    if unended:
        warn(
            f"{unended:,} documents do not end with {encoding.name}'s end-of-text, {encoding.end_of_text}: "
            f"they were written without one, or with another tokenizer"
        )
    is_ended_by_token = not unended and not sum(one.inner_ends for one in adopted)
    content = encoding.to_json()
    shards = [one.shard for one in adopted]
    if not sum(shard.tokens for shard in shards[: len(train)]):
        raise DataError(f"{', '.join(train)}: the shards for training contain no tokens")
    manifest = Manifest(
        dtype=dtypes[paths[0].name],
        encoding=encoding_record(encoding),
        train=tuple(shards[: len(train)]),
        val=tuple(shards[len(train) :]),
        skipped={},
        preparation={"adopted": True, "is_ended_by_token": is_ended_by_token},
        versions={"outlast": version("outlast"), "tiktoken": version("tiktoken")},
        sources=(),
    )
    write_durably(folder / ENCODING_FILE, content)
    write_durably(folder / FILE_NAME, manifest.to_bytes())
    return folder, manifest


def _common_folder(paths: Sequence[Path]) -> Path:
    """The folder that contains all shards; raises ConfigError if it contains a data set already."""
    problems = []
    for path in paths:
        missing = [
            name for kind in ("bin", "idx") if not (name := path.with_name(f"{path.name}.{kind}")).exists()
        ]
        problems += [f"{name}: no such file; a prefix names NAME.bin and NAME.idx" for name in missing]
        if not is_shard_name(path.name):
            problems.append(
                f"{shown(path)}: a shard's name consists of ASCII letters, digits, '.', '_' and '-', and "
                f"begins with a letter or a digit. Link the files to such a name"
            )
    if len(set(paths)) < len(paths):
        problems.append("two prefixes are equal; name each shard once")
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        names = ", ".join(sorted(map(str, folders)))
        problems.append(
            f"the shards of a data set must be in one folder, but these are in several: {names}. Link the "
            f"files into one folder"
        )
    for folder in folders:
        if (folder / FILE_NAME).exists():
            problems.append(f"{folder} already contains a data set: remove its {FILE_NAME} to adopt it again")
    if problems:
        raise ConfigError(problems)
    return folders.pop()


class _AdoptedShard(NamedTuple):
    """A shard, its documents without an end-of-text at their end, and its end-of-text ids elsewhere."""

    shard: Shard
    unended_documents: int
    inner_ends: int


def _adopt_shard(path: Path, dtype: str, encoding: Encoding) -> _AdoptedShard:
    """Check the shard and write its .sum file."""
    bin_path, idx_path = (path.with_name(f"{path.name}.{kind}") for kind in ("bin", "idx"))
    header = read_header(idx_path)
    if header.sequences and idx_path.stat().st_size == header.idx_bytes + header.sequences:
        raise DataError(
            f"{idx_path}: the index has a mode for each sequence, as multimodal data sets do; only text is "
            f"supported"
        )
    if idx_path.stat().st_size != header.idx_bytes:
        raise DataError(
            f"{idx_path}: {idx_path.stat().st_size} bytes, but its header requires {header.idx_bytes}: it "
            f"was truncated or is not an index"
        )
    index = IndexArrays(idx_path)
    tokens = index.tokens
    if bin_path.stat().st_size != tokens * ITEM_BYTES[dtype]:
        raise DataError(
            f"{bin_path}: {bin_path.stat().st_size} bytes, but its index describes {tokens} tokens in {dtype}"
        )
    index.require_contiguous(ITEM_BYTES[dtype])
    bin_record, bin_sums = _checksum(bin_path)
    ids: NDArray[np.integer] = np.memmap(bin_path, dtype, "r") if tokens else np.empty(0, dtype)
    smallest, largest, ends_of_text = _scan(ids, encoding.end_of_text)
    if smallest < 0:
        raise DataError(f"{bin_path}: contains the negative id {smallest}: it is damaged or contains no ids")
    if largest >= encoding.vocab_size:
        raise DataError(
            f"{bin_path}: contains id {largest}, but {encoding.name} has only {encoding.vocab_size} ids: it "
            f"was written with another tokenizer"
        )
    idx_record, idx_sums = _checksum(idx_path)
    sums = sums_content(bin_sums, idx_sums)
    write_durably(path.with_name(f"{path.name}.sum"), sums)
    record = FileRecord(len(sums), xxhash.xxh3_128_hexdigest(sums))
    lengths = index.document_lengths()
    ends = np.cumsum(lengths)[lengths > 0]
    ended_documents = int((ids[ends - 1] == encoding.end_of_text).sum())
    shard = Shard(path.name, tokens, header.documents, bin_record, idx_record, record)
    return _AdoptedShard(shard, len(ends) - ended_documents, ends_of_text - ended_documents)


def _scan(ids: NDArray[np.integer], end_of_text: int) -> tuple[int, int, int]:
    """The smallest id, the largest one, and the number of ids equal to `end_of_text`."""
    smallest, largest, ends_of_text = 0, -1, 0
    for first in range(0, len(ids), BLOCK_BYTES):
        part = ids[first : first + BLOCK_BYTES]
        smallest = min(smallest, int(part.min()))  # int32 allows negative ids
        largest = max(largest, int(part.max()))
        ends_of_text += int((part == end_of_text).sum())
    return smallest, largest, ends_of_text


def _checksum(path: Path) -> tuple[FileRecord, list[str]]:
    """A file's size and checksum, and the checksums of its blocks."""
    whole = xxhash.xxh3_128()
    sums, size_bytes = [], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            sums.append(xxhash.xxh3_128_hexdigest(block))
            size_bytes += len(block)
    return FileRecord(size_bytes, whole.hexdigest()), sums
