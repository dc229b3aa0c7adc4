"""Whether a folder already holds, or has begun, exactly the data set that is asked for.

Nothing is ever continued or kept under other settings than it was begun with: the ids would differ, and
nobody would see it.
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
    """Refuse to continue what was begun in `out` with settings that make other ids; else note these."""
    work = out / ".prepare"
    path = work / "settings.json"
    wanted = {"tokenizer": encoding.name, "fingerprint": encoding.fingerprint, **preparation}
    del wanted["on_bad"]  # it decides what happens to broken documents, not what a chunk becomes
    if path.exists():
        changes = _changes(json.loads(path.read_bytes()), wanted)
        if changes:
            raise ConfigError(
                f"{out} holds an unfinished preparation with other settings: {changes}. Continue it "
                f"with those, choose another `out`, or remove {work} to begin anew"
            )
    write_durably(path, json.dumps(wanted).encode())


def require_identical(
    out: Path,
    encoding: Encoding,
    preparation: Mapping[str, Any],
    sources: Sequence[SourceFile | RowSource],
) -> Manifest:
    """The manifest of the complete data set in `out`, which must be what these settings would make."""
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
            f"{out} holds a complete data set that was prepared otherwise: {changes}. Choose another "
            f"`out`, or remove {out} to prepare it anew"
        )
    problems = check(out, manifest)
    if problems:
        raise DataError("\n".join([*problems, f"Remove {out} to prepare it anew"]))
    return manifest


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what differs."""
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
