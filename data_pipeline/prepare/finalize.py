"""The last act of a preparation: every file gets its final name, then the manifest is written.

Until the manifest stands all of it can be taken back, so a kill among the renames costs nothing.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.dataset.manifest import ENCODING_FILE, FILE_NAME, EncodingRecord, Manifest, Shard, Split
from data_pipeline.dataset.megatron_index import dtype_for
from data_pipeline.durable import fsync_folder, write_durably
from data_pipeline.prepare.chunk import Chunk, ChunkRecord
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.tokenizer.encoding import Encoding


def finalize(
    out: Path,
    work: Path,
    encoding: Encoding,
    preparation: Mapping[str, Any],
    sources: Sequence[SourceFile | RowSource],
    chunks: Sequence[Chunk],
    records: Mapping[Chunk, ChunkRecord],
) -> Manifest:
    """Move what `chunks` became from `work` to `out`, in order, and write the manifest."""
    names = {ENCODING_FILE: ENCODING_FILE}
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for split, numbered in shards.items():
        for chunk in chunks:
            for shard in records[chunk].shards(split):
                final = replace(shard, name=f"{split}-{len(numbered):05d}")
                numbered.append(final)
                for name, below in zip(final.files, shard.files, strict=True):
                    names[name] = f"{chunk.name}/{below}"
    manifest = Manifest(
        dtype=dtype_for(encoding.vocab_size),
        encoding=encoding_record(encoding),
        train=tuple(shards["train"]),
        val=tuple(shards["val"]),
        skipped=_skipped(records.values()),
        preparation=preparation,
        versions=_versions(records.values()),
        sources=tuple(_sources(sources, chunks, records)),
    )
    # Written first, so that a preparation that is killed among the renames can take the names back.
    write_durably(work / "names.json", json.dumps(names).encode())
    for name, below in names.items():
        (work / below).rename(out / name)
    fsync_folder(out)
    write_durably(work / FILE_NAME, manifest.to_bytes())
    (work / FILE_NAME).rename(out / FILE_NAME)
    fsync_folder(out)
    return manifest


def undo_renames(out: Path, work: Path) -> None:
    """Undo the renames of a preparation that ended among them."""
    names = work / "names.json"
    if not names.exists():
        return
    for name, below in json.loads(names.read_bytes()).items():
        if (out / name).exists() and not (work / below).exists():
            (out / name).rename(work / below)
    names.unlink()


def _skipped(records: Iterable[ChunkRecord]) -> dict[str, int]:
    """How many documents were left out, by reason."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.bad)
        total["empty"] += record.empty
        total["an exact copy of an earlier one"] += record.copies
    return {reason: total[reason] for reason in sorted(total) if total[reason]}


def _sources(
    sources: Sequence[SourceFile | RowSource], chunks: Sequence[Chunk], records: Mapping[Chunk, ChunkRecord]
) -> Iterator[dict[str, Any]]:
    ranges: list[list[dict[str, Any]]] = [[] for _ in sources]
    number = {source.identity: index for index, source in enumerate(sources)}
    for chunk in chunks:
        for span, checksum in zip(chunk.spans, records[chunk].checksums, strict=True):
            part = {"start": span.start, "stop": span.stop, "xxh3_128": checksum}
            ranges[number[span.source.identity]].append(part)
    for source, parts in zip(sources, ranges, strict=True):
        yield {"name": source.name, "size_bytes": source.size_bytes, "unit": source.unit, "ranges": parts}


def _versions(records: Iterable[ChunkRecord]) -> dict[str, str]:
    """Of ours, of tiktoken, and of what else made ids."""
    packages = {"outlast", "tiktoken", *(record.encoder for record in records)}
    return {package: _version(package) for package in sorted(packages)}


def encoding_record(encoding: Encoding) -> EncodingRecord:
    """What a manifest says of `encoding`."""
    content = encoding.to_json()
    return EncodingRecord(
        name=encoding.name,
        fingerprint=encoding.fingerprint,
        vocab_size=encoding.vocab_size,
        end_of_text=encoding.end_of_text,
        size_bytes=len(content),
        xxh3_128=xxhash.xxh3_128_hexdigest(content),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
