"""A manifest beside token shards that Megatron's tools wrote, so that they are a data set here.

The .bin and .idx files stay as they are and where they are; .sum files, encoding.json and, last, the manifest
are written next to them. Refused: files whose index does not describe them, and ids that the tokenizer does
not have.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import BLOCK_BYTES, ENCODING_FILE, FILE_NAME, FileRecord, Manifest, Shard
from data_pipeline.dataset.megatron_index import ITEM_BYTES, read_header
from data_pipeline.dataset.shards import IndexArrays, sums_content
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.finalize import encoding_record
from data_pipeline.tokenizer.encoding import Encoding, load_encoding


def adopt(
    train: Sequence[str],
    val: Sequence[str],
    tokenizer: str,
    tokenizer_pattern: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Path, Manifest]:
    """The folder and the manifest of the shards with these path prefixes, as Megatron names them.

    `tell` hears one sentence for what a user should know. Raises ConfigError with every prefix that names no
    shard, DataError for files that are not what their index says or ids outside the vocabulary.
    """
    encoding = load_encoding(tokenizer, tokenizer_pattern)
    paths = [Path(prefix.removesuffix(".bin").removesuffix(".idx")).absolute() for prefix in (*train, *val)]
    folder = _folder(paths)
    dtypes = {path.name: read_header(path.with_name(f"{path.name}.idx")).dtype for path in paths}
    if len(set(dtypes.values())) > 1:
        kinds = ", ".join(f"{name} has {dtype}" for name, dtype in dtypes.items())
        raise ConfigError(f"shards of one data set have one dtype: {kinds}. Adopt them as several data sets")
    shards = []
    unended = inside = 0
    for path in paths:
        shard, without_end, with_end_inside = _adopt_one(path, dtypes[path.name], encoding)
        shards.append(shard)
        unended += without_end
        inside += with_end_inside
    if unended:
        tell(
            f"{unended:,} documents do not end with {encoding.name}'s end-of-text, {encoding.end_of_text}: "
            f"they were written without one, or with another tokenizer"
        )
    content = encoding.to_json()
    manifest = Manifest(
        dtype=dtypes[paths[0].name],
        encoding=encoding_record(encoding),
        train=tuple(shards[: len(train)]),
        val=tuple(shards[len(train) :]),
        skipped={},
        preparation={"adopted": True, "is_ended_by_token": not unended and not inside},
        versions={"outlast": version("outlast"), "tiktoken": version("tiktoken")},
        sources=(),
    )
    write_durably(folder / ENCODING_FILE, content)
    write_durably(folder / FILE_NAME, manifest.to_bytes())
    return folder, manifest


def _folder(paths: Sequence[Path]) -> Path:
    """The one folder of all the shards, which must be free."""
    problems = []
    for path in paths:
        missing = [
            name for kind in ("bin", "idx") if not (name := path.with_name(f"{path.name}.{kind}")).exists()
        ]
        problems += [f"{name}: no such file; a prefix names NAME.bin and NAME.idx" for name in missing]
    if len(set(paths)) < len(paths):
        problems.append("a prefix is named twice; name each shard once")
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        names = ", ".join(sorted(map(str, folders)))
        problems.append(
            f"a data set lies in one folder, and these are several: {names}. Link the files into one"
        )
    for folder in folders:
        if (folder / FILE_NAME).exists():
            problems.append(f"{folder} holds a data set already: remove its {FILE_NAME} to adopt anew")
    if problems:
        raise ConfigError(problems)
    return folders.pop()


def _adopt_one(path: Path, dtype: str, encoding: Encoding) -> tuple[Shard, int, int]:
    """The shard, how many documents lack end-of-text at their end, and how many of it stand elsewhere.

    Writes the shard's .sum file.
    """
    bin_path, idx_path = (path.with_name(f"{path.name}.{kind}") for kind in ("bin", "idx"))
    header = read_header(idx_path)
    if idx_path.stat().st_size != header.idx_bytes:
        raise DataError(
            f"{idx_path}: {idx_path.stat().st_size} bytes, but its header makes {header.idx_bytes}: it was "
            f"cut short or is no index"
        )
    index = IndexArrays(idx_path)
    tokens = index.tokens
    if bin_path.stat().st_size != tokens * ITEM_BYTES[dtype]:
        raise DataError(
            f"{bin_path}: {bin_path.stat().st_size} bytes, but its index describes {tokens} tokens in {dtype}"
        )
    index.require_contiguous(ITEM_BYTES[dtype])
    bin_record, bin_chunks = _summed(bin_path)
    ids: NDArray[np.integer] = np.memmap(bin_path, dtype, "r") if tokens else np.empty(0, dtype)
    largest, ended = _look_through(ids, encoding.end_of_text)
    if largest >= encoding.vocab_size:
        raise DataError(
            f"{bin_path}: holds id {largest}, and {encoding.name} has {encoding.vocab_size} ids: it was "
            f"written with another tokenizer"
        )
    idx_record, idx_chunks = _summed(idx_path)
    sums = sums_content(bin_chunks, idx_chunks)
    write_durably(path.with_name(f"{path.name}.sum"), sums)
    record = FileRecord(len(sums), xxhash.xxh3_128_hexdigest(sums))
    lengths = index.document_lengths()
    ends = np.cumsum(lengths)[lengths > 0]
    at_end = int((ids[ends - 1] == encoding.end_of_text).sum())
    shard = Shard(path.name, tokens, header.documents, bin_record, idx_record, record)
    return shard, len(ends) - at_end, ended - at_end


def _look_through(ids: NDArray[np.integer], end_of_text: int) -> tuple[int, int]:
    """The largest id, and how often `end_of_text` stands in `ids`."""
    largest = -1
    ended = 0
    for first in range(0, len(ids), BLOCK_BYTES):
        part = ids[first : first + BLOCK_BYTES]
        # Negative ids, which int32 has room for, are as wrong as large ones.
        largest = max(largest, int(part.max()), int(part.min() < 0) * 2**31)
        ended += int((part == end_of_text).sum())
    return largest, ended


def _summed(path: Path) -> tuple[FileRecord, list[str]]:
    """A file's size and checksum, and the checksums of its chunks."""
    whole = xxhash.xxh3_128()
    chunks, size_bytes = [], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            chunks.append(xxhash.xxh3_128_hexdigest(block))
            size_bytes += len(block)
    return FileRecord(size_bytes, whole.hexdigest()), chunks
