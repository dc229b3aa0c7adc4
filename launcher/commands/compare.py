"""`outlast compare RUN RUN`: where two runs differ, in their configs and in their losses."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from gpt.run import record
from gpt.run.run_dir import RunDir
from launcher.runs.store import changed_fields, open_run, read_config

_ROWS = 10
_LOSSES = ("train/loss", "val/loss")


def compare_runs(first: str, second: str, *, as_json: bool) -> int:
    """Print what differs between the configs and the losses of two runs; the exit code."""
    runs = open_run(first), open_run(second)
    before, after = (read_config(run).model_dump(mode="json", exclude_none=True) for run in runs)
    fields = changed_fields(before, after)
    rows = shared_losses(*(_losses(run) for run in runs))
    if as_json:
        click.echo(json.dumps({"config": fields, "losses": rows}))
        return 0
    for name, (old, new) in fields.items():
        click.echo(f"{name}: {_text(old)} → {_text(new)}")
    if not fields:
        click.echo("the configs are the same")
    if not rows:
        click.echo("no step is recorded in both runs")
        return 0
    click.echo(f"\n{'step':>10}{'loss':>12}{'loss':>12}{'val loss':>12}{'val loss':>12}")
    for row in rows:
        numbers = "".join(f"{_number(value):>12}" for name in _LOSSES for value in row[name])
        click.echo(f"{row['step']:>10}{numbers}")
    return 0


def shared_losses(
    first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The losses of both runs at some steps that both have recorded, the last one and evaluations first."""
    steps = sorted(first.keys() & second.keys())
    scored = [step for step in steps if "val/loss" in first[step] and "val/loss" in second[step]]
    chosen = _spread(scored if len(scored) > 1 else steps)
    return [
        {"step": step, **{name: [first[step].get(name), second[step].get(name)] for name in _LOSSES}}
        for step in sorted({*chosen, *steps[-1:]})
    ]


def _spread(steps: Sequence[int]) -> list[int]:
    """At most _ROWS of `steps`, evenly spread, with the last one."""
    every = -(-len(steps) // _ROWS) or 1
    return [step for number, step in enumerate(reversed(steps)) if number % every == 0]


def _losses(run: RunDir) -> dict[int, Mapping[str, Any]]:
    return {line["step"]: line for line in record.read(run.metrics) if isinstance(line.get("step"), int)}


def _text(value: object) -> str:
    return "not set" if value is None else json.dumps(value)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"
