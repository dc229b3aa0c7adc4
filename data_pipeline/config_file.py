"""Reads TOML files into frozen pydantic models and reports every problem at once, in plain words.

A value comes from one of three layers: the field's default, the file, or `--set a.b=c`; a later layer wins.
Nothing else (no environment variable, no include) changes a value, so the file and the command line together
determine the config.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """One table of a config file. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError if the file is missing or is not valid TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def with_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tables` with each override `a.b=c` applied. A value that is not valid TOML is taken as a string."""
    fields: dict[str, Any] = {}
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals and all(name.strip().split(".")):
            fields[name.strip()] = _toml_value(text.strip())
        else:
            problems.append(f"--set {override}: expected a.b=value, for example --set batch.micro_batch=4")
    return with_fields(tables, fields, problems)


def with_fields(
    tables: Mapping[str, Any], fields: Mapping[str, Any], problems: Sequence[str] = ()
) -> dict[str, Any]:
    """`tables` with each dotted field set.

    Raises ConfigError that lists `problems` first and then each field whose parent is a value, not a table.
    """
    result: dict[str, Any] = _deep_copy(tables)
    found = list(problems)
    for name, value in fields.items():
        *above, last = name.split(".")
        table = result
        for key in above:
            below = table.setdefault(key, {})
            if not isinstance(below, dict):
                found.append(f"--set {name}: {key} is a value, not a table")
                break
            table = below
        else:
            table[last] = value
    if found:
        raise ConfigError(found)
    return result


def dotted(
    tables: Mapping[str, Any], prefix: str = "", *, into_lists: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields each value of nested tables with its dotted name; `into_lists` descends into lists of tables."""
    for name, value in tables.items():
        below = value
        if into_lists and isinstance(value, list) and value and isinstance(value[0], Mapping):
            below = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(below, Mapping):
            yield from dotted(below, f"{prefix}{name}.", into_lists=into_lists)
        else:
            yield prefix + name, value


def validate(model: type[Model], tables: Mapping[str, Any], source: str) -> Model:
    """`tables` as a `model`. Raises ConfigError that lists every problem and the field that it concerns."""
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        problems = [_sentence(model, problem) for problem in error.errors()]
        raise ConfigError([f"{source}: {problem}" for problem in problems]) from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(below) for key, below in value.items()}
    return value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _sentence(model: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {location!r}{_suggestion(model, problem['loc'])}"
    if kind == "missing":
        return f"{location} is missing and has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if kind == "value_error":  # the validator's message already names the fields
        return message
    return f"{location} = {problem['input']!r}: {message}"


def _suggestion(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = list(field_names(model))
    wanted = ".".join(str(part) for part in location)
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    parent = wanted.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    if not near:
        leaf = difflib.get_close_matches(wanted.rpartition(".")[2], by_leaf, n=1, cutoff=0.6)
        near = [by_leaf[name] for name in leaf]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys: {', '.join(name.rpartition('.')[2] for name in siblings)}" if siblings else ""


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every key of `model`; a table comes before the keys inside it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from field_names(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list, tuple):
        for argument in get_args(annotation):
            yield from _sections(argument)
