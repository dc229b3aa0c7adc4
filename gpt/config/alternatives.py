"""Fields of a run config of which exactly one is set: setting one with `--set` replaces the other.

Torch-free. The config's own validators refuse tables with both or none.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.config_file import with_overrides

_PAIRS = (("schedule.total_steps", "schedule.total_tokens"), ("data.path", "data.mixture"))


def without_alternatives(tables: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """`tables` without each field whose alternative is among the dotted names `given`, unless both are."""
    names = {name for field in given for name in (field, ".".join(field.split(".")[:2]))}
    dropped = [
        other for pair in _PAIRS for name, other in (pair, pair[::-1]) if name in names and other not in names
    ]
    return with_overrides(tables, [f"{name}=" for name in dropped])
