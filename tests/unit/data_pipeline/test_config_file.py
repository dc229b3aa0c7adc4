"""TOML files and --set: what is read, and in which words wrong input is refused."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from data_pipeline.config_file import Section, read_toml, validate, with_overrides
from data_pipeline.errors import ConfigError
from data_pipeline.prepare.config import DataPrepConfig


class Inner(Section):
    micro_batch: int = 1
    share: float = 1.0
    is_fast: bool = False
    every: int = 1


class Other(Section):
    every: int = 1


class Outer(Section):
    batch: Inner = Inner()
    other: Other = Other()
    sizes: tuple[Inner, ...] = ()
    free: dict[str, Any] = Field(default_factory=dict)
    limit: Annotated[str, Field(pattern=r"^\d+:\d\d$")] | None = Field(
        default=None, description="A time, as MM:SS."
    )


def problems(tables: dict[str, Any], model: type[Section] = Outer) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(model, tables, "x.toml")
    return error.value.problems


def test_a_byte_order_mark_is_ignored_and_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes('a = "ü"\r\n'.encode("utf-8-sig"))
    assert read_toml(path) == {"a": "ü"}
    for name in ("utf-16-le", "utf-16-be"):
        path.write_bytes("\ufeffa = 1\n".encode(name))
        with pytest.raises(ConfigError, match=r"is in UTF-16\. Save it as UTF-8, which TOML requires\.$"):
            read_toml(path)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("time_limit = 2-00:00:00", 'A text needs quotes: time_limit = "2-00:00:00"'),
        ("path = data/mine  # here", 'A text needs quotes: path = "data/mine"'),
        ("[unclosed", ""),
        ('b = "b" c', ""),
    ],
)
def test_a_text_without_quotes_is_explained(tmp_path: Path, line: str, hint: str) -> None:
    (tmp_path / "x.toml").write_text(f"a = 1\n{line}\n")
    with pytest.raises(ConfigError, match="is not valid TOML") as error:
        read_toml(tmp_path / "x.toml")
    assert str(error.value).partition("TOML: ")[2].partition(". ")[2] == hint


def test_a_time_without_quotes_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("limit = 12:00:00\n")
    assert problems(read_toml(tmp_path / "x.toml")) == [
        'x.toml: limit is a time or a date. A text needs quotes: limit = "12:00:00"'
    ]
    assert with_overrides({}, ["limit=12:00:00"]) == {"limit": "12:00:00"}


def test_a_form_is_explained_in_words() -> None:
    assert problems({"limit": "soon"}) == [
        "x.toml: limit = 'soon' is not of the form that it needs. A time, as MM:SS."
    ]


def test_true_is_no_number() -> None:
    tables = {"batch": {"micro_batch": True, "share": False}, "sizes": [{"every": 2}, {"every": True}]}
    assert problems(tables) == [
        "x.toml: batch.micro_batch = true: a number is needed",
        "x.toml: batch.share = false: a number is needed",
        "x.toml: sizes.1.every = true: a number is needed",
    ]
    fine = {"batch": {"is_fast": True, "share": 1}, "free": {"a": True, "b": [True]}}
    assert validate(Outer, fine, "x.toml").batch.is_fast


def test_a_field_without_its_table_is_found_by_its_name() -> None:
    assert problems({"micro_batch": 4}) == [
        "x.toml: unknown key 'micro_batch'; did you mean 'batch.micro_batch' or 'sizes.micro_batch'?"
    ]


def test_an_entry_of_a_list_is_set_by_its_number() -> None:
    tables = {"mixture": [{"weight": 1, "path": "a"}, {"weight": 2, "path": "b"}], "skip": [[1, 2]]}
    changed = with_overrides(tables, ["mixture.1.weight=3", "skip.0=[5, 6]"])
    assert changed == {"mixture": [{"weight": 1, "path": "a"}, {"weight": 3, "path": "b"}], "skip": [[5, 6]]}
    assert tables["mixture"][1] == {"weight": 2, "path": "b"}
    with pytest.raises(ConfigError) as error:
        with_overrides(tables, ["mixture.2.weight=3", "mixture.weight=3", "skip.0=", "mixture.0.path.x=1"])
    entries = (
        "mixture is a list of 2 entries, numbered from 0. Give the number of one of them, as in mixture.0"
    )
    assert error.value.problems == [
        f"--set mixture.2.weight: {entries}, or set the whole list.",
        f"--set mixture.weight: {entries}, or set the whole list.",
        "--set skip.0: an entry of skip cannot be removed by itself; set the whole list.",
        "--set mixture.0.path.x: path is a value, not a table",
    ]


def test_an_empty_value_removes_a_field() -> None:
    tables = {"data": {"max_epochs": 1, "path": "x"}}
    assert with_overrides(tables, ["data.max_epochs=", "none.at.all="])["data"] == {"path": "x"}
    assert with_overrides(tables, ['data.path=""'])["data"]["path"] == ""


@pytest.mark.parametrize("tables", [{"sources": [{"path": "a", "weight": 1}]}, {"mixture": []}])
def test_a_mixture_in_a_data_config_is_explained(tables: dict[str, Any]) -> None:
    [problem] = problems({"tokenizer": "gpt2", "out": "d", **tables}, DataPrepConfig)
    assert "the run config mixes them: data.mixture = [{path = " in problem
