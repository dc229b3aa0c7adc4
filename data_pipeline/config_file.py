"""Reads TOML files into frozen pydantic models and reports every problem at once, in plain words.

A value comes from one of three layers: the field's default, the file, or `--set a.b=c`; a later layer wins.
Nothing else (no environment variable, no include) changes a value, so the file and the command line together
determine the config.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_UNSET = object()  # the value of an override that removes a field
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Section(BaseModel):
    """One table of a config file. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError if the file is missing or is not valid TOML."""
    try:
        content = path.read_bytes()
        if content.startswith(_UTF_16):
            raise ConfigError(f"{path} is in UTF-16. Save it as UTF-8, which TOML requires.")
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}{_toml_hint(content, error)}") from None


def with_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tables` with each override `a.b=c` applied; `a.b=` removes the field, so that its default holds.

    A value that is not valid TOML is taken as a string.
    """
    fields: dict[str, Any] = {}
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals and all(name.strip().split(".")):
            fields[name.strip()] = _toml_value(text.strip()) if text.strip() else _UNSET
        else:
            problems.append(f"--set {override}: expected a.b=value, for example --set batch.micro_batch=4")
    return with_fields(tables, fields, problems)


def with_fields(
    tables: Mapping[str, Any], fields: Mapping[str, Any], problems: Sequence[str] = ()
) -> dict[str, Any]:
    """`tables` with each dotted field set; a number names an entry of a list, from 0: data.mixture.0.weight.

    Raises ConfigError that lists `problems` first and then each field whose parent is not a table or a list
    with that entry.
    """
    result: dict[str, Any] = _deep_copy(tables)
    found = list(problems)
    for name, value in fields.items():
        try:
            _set(result, name.split("."), value)
        except ConfigError as error:
            found.append(f"--set {name}: {error}")
    if found:
        raise ConfigError(found)
    return result


def _set(table: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set or remove one field below `table`. Raises ConfigError that says where there is no such place."""
    place: Any = table
    for number, key in enumerate(keys):
        is_last = number == len(keys) - 1
        if isinstance(place, list):
            name = ".".join(keys[:number])
            if not key.isdigit() or int(key) >= len(place):
                raise ConfigError(
                    f"{name} is a list of {len(place)} entries, numbered from 0. Give the number of one of "
                    f"them, as in {name}.0, or set the whole list."
                )
            if is_last and value is not _UNSET:
                place[int(key)] = value
            elif is_last:
                raise ConfigError(f"an entry of {name} cannot be removed by itself; set the whole list.")
            else:
                place = place[int(key)]
        elif not isinstance(place, dict):
            raise ConfigError(f"{keys[number - 1]} is a value, not a table")
        elif not is_last:
            place = place.setdefault(key, {})
        elif value is _UNSET:
            place.pop(key, None)
        else:
            place[key] = value


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
        made = model.model_validate(tables)
        problems = list(_booleans_for_numbers(tables, made))
    except ValidationError as error:
        problems = [_sentence(model, problem) for problem in error.errors()]
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return made


def _booleans_for_numbers(given: Any, made: Any, name: str = "") -> Iterator[str]:
    """What pydantic has taken as 1 or 0: each true or false that became another type, with its name."""
    if isinstance(given, bool) and type(made) in (int, float):
        yield f"{name} = {str(given).lower()}: a number is needed"
    elif isinstance(given, Mapping):
        for key, below in given.items():
            found = made.get(key) if isinstance(made, Mapping) else getattr(made, key, None)
            yield from _booleans_for_numbers(below, found, f"{name}.{key}" if name else key)
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple):
        for number, (below, found) in enumerate(zip(given, made, strict=False)):
            yield from _booleans_for_numbers(below, found, f"{name}.{number}")


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_deep_copy(below) for below in value]
    return value


def _toml_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
    return text if isinstance(value, date | time) else value  # 12:00:00 is a time in TOML; no field is one


def _toml_hint(content: bytes, error: Exception) -> str:
    """What to do about a line with a text that is not in quotes, or nothing."""
    place = re.search(r"at line (\d+)", str(error))
    if place is None:
        return ""
    line = content.decode("utf-8-sig").splitlines()[int(place[1]) - 1]
    found = re.fullmatch(r"\s*([\w.-]+)\s*=\s*([^\s\"'\[{#][^\"'\[{#]*?)\s*(#.*)?", line)
    return "" if found is None else f'. A text needs quotes: {found[1]} = "{found[2]}"'


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
    if kind == "string_pattern_mismatch":
        described = _description(model, problem["loc"])
        return f"{location} = {problem['input']!r} is not of the form that it needs. {described}"
    if kind == "string_type" and isinstance(problem["input"], date | time):
        return f'{location} is a time or a date. A text needs quotes: {location} = "{problem["input"]}"'
    return f"{location} = {problem['input']!r}: {message}"


def _suggestion(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = list(field_names(model))
    wanted = ".".join(str(part) for part in location)
    exact = [repr(name) for name in known if name.endswith(f".{wanted}")]
    if exact:
        return f"; did you mean {' or '.join(exact)}?"
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


def _description(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The description of the field at `location`."""
    sections, description = [model], ""
    for part in location:
        for field in [section.model_fields[part] for section in sections if part in section.model_fields]:
            description, sections = field.description or "", list(_sections(field.annotation))
    return description


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
