"""RUN on the command line: a recipe's name or a TOML file, with `--set` on top, as plain tables.

Relative paths are resolved against the caller's directory, here and only here. Only a config that cannot be
found is refused: preflight decides whether the tables make a valid run.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from data_pipeline.config_file import read_toml, with_overrides
from data_pipeline.errors import ConfigError
from data_pipeline.remote import is_remote
from gpt.config.alternatives import without_alternatives
from launcher.paths import absolute, usable_path

_SQLITE = "sqlite:///"


def recipe_names() -> list[str]:
    """The run configs that ship with Outlast, by name."""
    folder = resources.files("gpt.recipes")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def recipe_path(name: str) -> Path:
    """The file of a recipe."""
    return Path(str(resources.files("gpt.recipes") / f"{name}.toml"))


def run_tables(name_or_path: str, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The tables of a run config, and its name for messages. Raises ConfigError."""
    path = usable_path(name_or_path)
    is_name = name_or_path in recipe_names()  # some have a dot: gpt2-1.5b
    if (is_name or not path.suffix) and not path.is_file():
        if not is_name:
            near = difflib.get_close_matches(name_or_path, recipe_names(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(recipe_names())}"
            raise ConfigError(f"{name_or_path}: neither a file nor a recipe; {hint}")
        path = recipe_path(name_or_path)
    return with_settings(read_toml(path), overrides), path.name


def with_settings(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tables` with `--set` on top, and absolute paths. Of two alternatives, the one that is set remains."""
    given = [name.strip() for name, _, text in (each.partition("=") for each in overrides) if text.strip()]
    return with_absolute_paths(with_overrides(without_alternatives(tables, given), overrides))


def with_absolute_paths(tables: dict[str, Any]) -> dict[str, Any]:
    """`tables` with absolute paths for data, checkpoint.mirror and an SQLite file in tracking.uri."""
    tracking = tables.get("tracking")
    uri = tracking.get("uri") if isinstance(tracking, dict) else None
    if isinstance(tracking, dict) and isinstance(uri, str) and (file := uri.removeprefix(_SQLITE)) != uri:
        tables = {**tables, "tracking": {**tracking, "uri": f"{_SQLITE}{absolute(file)}" if file else uri}}
    checkpoint = tables.get("checkpoint")
    mirror = checkpoint.get("mirror") if isinstance(checkpoint, dict) else None
    if isinstance(checkpoint, dict) and isinstance(mirror, str) and mirror and not is_remote(mirror):
        tables = {
            **tables,
            "checkpoint": {**checkpoint, "mirror": str(absolute(mirror, "checkpoint.mirror"))},
        }
    data = tables.get("data")
    if not isinstance(data, dict):
        return tables
    whole = dict(data)
    if isinstance(data.get("path"), str):
        whole["path"] = str(absolute(data["path"], "data.path"))
    if isinstance(data.get("mixture"), list):
        whole["mixture"] = [
            {**source, "path": str(absolute(source["path"], f"data.mixture.{number}.path"))}
            if isinstance(source, dict) and isinstance(source.get("path"), str)
            else source
            for number, source in enumerate(data["mixture"])
        ]
    return {**tables, "data": whole}
