"""Config files written as a user would: plain tables as TOML."""

import json
from collections.abc import Mapping
from typing import Any


def toml_text(tables: Mapping[str, Any]) -> str:
    """`tables` as TOML; None, which TOML has not, is left out."""
    given = {name: value for name, value in tables.items() if value is not None}
    plain = [f"{name} = {_value(value)}" for name, value in given.items() if not isinstance(value, Mapping)]
    for name, table in given.items():
        if isinstance(table, Mapping):
            plain.append(f"[{name}]")
            plain += [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join(plain) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{key} = {_value(item)}" for key, item in value.items() if item is not None)
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value)
