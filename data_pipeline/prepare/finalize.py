"""The last step of a preparation: move every file to its final name, then write the manifest.

Until the manifest exists, every rename can be undone. So a crash in the middle of the renames loses nothing.
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
from data_pipeline.durable import fsync_folder, rename_durably, write_durably
from data_pipeline.prepare.chunk import Chunk, ChunkRecord
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.tokenizer.encoding import Encoding

_NAMES_FILE = "names.json"


def finalize(
    out: Path,
    work: Path,
    encoding: Encoding,
    preparation: Mapping[str, Any],
    sources: Sequence[SourceFile | RowSource],
    chunks: Sequence[Chunk],
    records: Mapping[Chunk, ChunkRecord],
) -> Manifest:
    """Move the shards of `chunks`, in order, from `work` to `out`, and write the manifest."""
    names = {ENCODING_FILE: ENCODING_FILE}
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for split, numbered in shards.items():
        for chunk in chunks:
            for shard in records[chunk].shards(split):
                final = replace(shard, name=f"{split}-{len(numbered):05d}")
                numbered.append(final)
                for name, work_name in zip(final.files, shard.files, strict=True):
                    names[name] = f"{chunk.name}/{work_name}"
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
    # Written before the renames, so that the next preparation can undo them if this one crashes.
    write_durably(work / _NAMES_FILE, json.dumps(names).encode())
    for name, work_name in names.items():
        (work / work_name).rename(out / name)
    fsync_folder(out)
    write_durably(work / FILE_NAME, manifest.to_bytes())
    rename_durably(work / FILE_NAME, out / FILE_NAME)
    return manifest


def undo_renames(out: Path, work: Path) -> None:
    """Undo the renames of a preparation that crashed before it wrote the manifest."""
    names = work / _NAMES_FILE
    if not names.exists():
        return
    for name, work_name in json.loads(names.read_bytes()).items():
        if (out / name).exists() and not (work / work_name).exists():
            (out / name).rename(work / work_name)
    names.unlink()


def _skipped(records: Iterable[ChunkRecord]) -> dict[str, int]:
    """The number of documents left out, by reason."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.bad)
        total["empty"] += record.empty
        total["an exact copy of an earlier one"] += record.copies
    return {reason: total[reason] for reason in sorted(total) if total[reason]}


def _sources(
    sources: Sequence[SourceFile | RowSource], chunks: Sequence[Chunk], records: Mapping[Chunk, ChunkRecord]
) -> Iterator[dict[str, Any]]:
    """The manifest's entry for each source: its size, and the range and checksum of each span."""
    ranges: list[list[dict[str, Any]]] = [[] for _ in sources]
    number = {source.identity: index for index, source in enumerate(sources)}
    for chunk in chunks:
        for span, checksum in zip(chunk.spans, records[chunk].checksums, strict=True):
            part = {"start": span.start, "stop": span.stop, "xxh3_128": checksum}
            ranges[number[span.source.identity]].append(part)
    for source, parts in zip(sources, ranges, strict=True):
        yield {
            "name": source.name,
            "size_bytes": source.size_bytes,
            "unit": source.unit,
            "ranges": parts,
            **source_version(source),
        }


def source_version(source: SourceFile | RowSource) -> dict[str, str | int]:
    """What shows that a source is the same without reading it: where it is, and its version there.

    Manifests of data sets that earlier versions prepared do not have these keys.
    """
    if isinstance(source, RowSource):
        return {"version": source.fingerprint}
    return {"location": source.location, "version": source.version}


def _versions(records: Iterable[ChunkRecord]) -> dict[str, str]:
    """The versions of Outlast, tiktoken, and the other packages that computed ids."""
    packages = {"outlast", "tiktoken", *(record.encoder for record in records)}
    return {package: _version(package) for package in sorted(packages)}


def encoding_record(encoding: Encoding) -> EncodingRecord:
    """The manifest's record of `encoding`."""
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
