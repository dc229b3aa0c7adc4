"""Checks that a folder contains, or has begun, exactly the data set that the user asks for.

A preparation never continues or reuses work that was done with other settings: the ids would differ, and
nobody would notice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.dataset.integrity import check
from data_pipeline.dataset.manifest import Manifest, read_manifest
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.hub import RowSource
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
) -> Manifest:
    """The manifest of the complete data set in `out`.

    Raises ConfigError if other settings or sources made it, DataError if its files are damaged.
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
    if changes:
        raise ConfigError(
            f"{out} contains a complete data set with other settings: {changes}. Choose another `out`, or "
            f"remove {out} to prepare it again"
        )
    problems = check(out, manifest)
    if problems:
        raise DataError("\n".join([*problems, f"Remove {out} to prepare it again"]))
    return manifest


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A description of the differences, empty if there are none."""
    changes = []
    for key, value in now.items():
        was = before.get(key)
        if was == value:
            continue
        if key == "sources":
            changed = sorted({name for name, _ in set(was or ()) ^ set(value)})
            changes.append(f"sources (for example {changed[0]})" if changed else "the order of sources")
        elif key == "fingerprint":
            changes.append("the tokenizer's ids")
        else:
            changes.append(f"{key} = {was!r}, now {value!r}")
    return "; ".join(changes)
