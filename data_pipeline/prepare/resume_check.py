"""Checks that a folder contains, or has begun, exactly the data set that the user asks for.

A preparation never continues or reuses work that was done with other settings: the ids would differ, and
nobody would notice.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.dataset.integrity import check
from data_pipeline.dataset.manifest import Manifest, read_manifest
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.finalize import source_version
from data_pipeline.sources.documents import DocumentReader, checksum_of_range
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
from data_pipeline.sources.spans import Span
from data_pipeline.tokenizer.encoding import Encoding


def require_same_settings(out: Path, encoding: Encoding, preparation: Mapping[str, Any]) -> None:
    """Record the settings of a preparation in `out`, or raise ConfigError if it was begun with others."""
    work = out / ".prepare"
    path = work / "settings.json"
    wanted = {"tokenizer": encoding.name, "fingerprint": encoding.fingerprint, **preparation}
    del wanted["on_bad"]  # it decides what happens to broken documents, not what a chunk becomes
    if path.exists():
        changes = _changes(json.loads(path.read_bytes()), wanted)
        if changes:
            raise ConfigError(
                f"{out} contains an unfinished preparation with other settings: {changes}. Continue it with "
                f"those settings, choose another `out`, or remove {work} to start over"
            )
    write_durably(path, json.dumps(wanted).encode())


def require_identical(
    out: Path,
    encoding: Encoding,
    preparation: Mapping[str, Any],
    sources: Sequence[SourceFile | RowSource],
    message: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """The manifest of the complete data set in `out`.

    A source whose place or version differs from the recorded one is read again and compared by its checksum;
    `message` is told so. Raises ConfigError if other settings or sources made the data set, DataError if its
    files are damaged.
    """
    manifest = read_manifest(out)
    before = {
        "tokenizer": manifest.encoding.name,
        "fingerprint": manifest.encoding.fingerprint,
        **manifest.preparation,
        "sources": [(source["name"], source["size_bytes"]) for source in manifest.sources],
    }
    now = {
        "tokenizer": encoding.name,
        "fingerprint": encoding.fingerprint,
        **preparation,
        "sources": [(source.name, source.size_bytes) for source in sources],
    }
    changes = _changes(before, now)
    if not changes:
        separator = preparation.get("document_separator")
        changed = list(_changed_sources(manifest, sources, preparation["text_field"], separator, message))
        changes = f"sources (the text of {changed[0]} changed)" if changed else ""
    if changes:
        raise ConfigError(
            f"{out} contains a complete data set with other settings: {changes}. Choose another `out`, or "
            f"remove {out} to prepare it again"
        )
    problems = check(out, manifest)
    if problems:
        raise DataError("\n".join([*problems, f"Remove {out} to prepare it again"]))
    return manifest


def _changed_sources(
    manifest: Manifest,
    sources: Sequence[SourceFile | RowSource],
    text_field: str,
    separator: str | None,
    message: Callable[[str], None],
) -> Iterator[str]:
    """The names of the sources that contain something else than when the data set was prepared."""
    for source, recorded in zip(sources, manifest.sources, strict=True):
        wanted = source_version(source)
        if all(recorded.get(key) == value for key, value in wanted.items()):
            continue
        is_local = isinstance(source, SourceFile) and not source.is_remote
        if not is_local and "version" not in recorded:  # an earlier version compared only name and size
            continue
        message(f"comparing {source.name} with its recorded checksum, because its time or place differs")
        for part in recorded["ranges"]:
            if _checksum(source, part["start"], part["stop"], text_field, separator) != part["xxh3_128"]:
                yield source.name
                break


def _checksum(
    source: SourceFile | RowSource, start: int, stop: int, text_field: str, separator: str | None
) -> str:
    if isinstance(source, SourceFile) and not source.is_remote:
        return checksum_of_range(source, start, stop)
    reader = DocumentReader(Span(source, start, stop), text_field, separator)
    for _ in reader:
        pass
    return reader.checksum


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A description of the differences, empty if there are none."""
    changes = []
    for key in dict.fromkeys((*now, *before)):
        value, was = now.get(key), before.get(key)
        if was == value:
            continue
        if key == "sources":
            changed = sorted({name for name, _ in set(was or ()) ^ set(value or ())})
            changes.append(f"sources (for example {changed[0]})" if changed else "the order of sources")
        elif key == "fingerprint":
            changes.append("the tokenizer's ids")
        else:
            changes.append(f"{key} = {was!r}, now {value!r}")
    return "; ".join(changes)
