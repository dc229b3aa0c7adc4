"""`outlast recipes` and `outlast init`: the packaged run configs, as a list and as a file to begin with."""

import difflib
import re

import click

from data_pipeline.config_file import read_toml, validate
from data_pipeline.errors import ConfigError
from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from launcher.runs.recipes import recipe_names, recipe_path

_ASSUMED_VOCABULARY = 50_257  # of a recipe that takes the vocabulary from its data
_DATA_TABLE = """
[data]
path = "data/mine"   # the folder that `outlast prepare` creates
"""


def list_recipes() -> int:
    """Print each recipe with its size, steps and tokens; the exit code."""
    for name in recipe_names():
        tables = read_toml(recipe_path(name))
        whole = {**tables, "data": {"path": "/nowhere", **tables.get("data", {})}}
        config = validate(RunConfig, whole, name).resolve(_ASSUMED_VOCABULARY)
        tokens = config.batch.sizes.until(config.total_steps)
        parameters = parameter_count(config.model)
        click.echo(
            f"{name:<16}{parameters:>16,} parameters {config.total_steps:>10,} steps {tokens:>21,} tokens"
        )
    return 0


def print_recipe(name: str) -> int:
    """Print the file of a recipe, with a [data] table to fill in; the exit code. Raises ConfigError."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(recipe_names())}"
        raise ConfigError(f"{name} is not a recipe; {hint}")
    text = recipe_path(name).read_text(encoding="utf-8")
    has_data = re.search(r"^\[data\]", text, re.MULTILINE) is not None
    click.echo(text.rstrip("\n") + ("" if has_data else f"\n{_DATA_TABLE.rstrip()}"))
    return 0
