"""`outlast plan`, and what every command that starts a run prints of a checked request: plan and warnings."""

import json
from collections.abc import Sequence

import click

from launcher.commands.trace import dry_step
from launcher.preflight.check import examine
from launcher.preflight.plan import ASSUMED_MFU, plan, table
from launcher.preflight.trace import trace_json, trace_lines
from launcher.request import Request
from launcher.runs.recipes import run_tables


def print_plan(
    run: str, cluster: str, overrides: Sequence[str], *, as_json: bool, mfu: float, is_traced: bool = False
) -> int:
    """Print what `run` will need on `cluster`, with `is_traced` a dry step too; the exit code."""
    tables, source = run_tables(run, overrides)
    request = examine(tables, source, cluster, None)
    show_warnings(request)
    step = dry_step(request) if is_traced else None
    if as_json:
        needs = plan(request.config, request.cluster, request.train_tokens, mfu)
        traced = {} if step is None else {"trace": trace_json(step, request.config, request.cluster, mfu)}
        click.echo(json.dumps({**needs.as_json(), **traced}))
        return 0
    show_plan(request, mfu)
    if step is not None:
        click.echo()
        for line in trace_lines(step, request.config, request.cluster, mfu):
            click.echo(line)
    return 0


def show_plan(request: Request, mfu: float = ASSUMED_MFU) -> None:
    """Print the plan of a request on standard output, as an aligned table."""
    rows = table(plan(request.config, request.cluster, request.train_tokens, mfu))
    width = max(32, *(len(name) + 2 for name, _ in rows))  # the path of a source can be long
    for name, value in rows:
        click.echo(f"{name:<{width}}{value}")


def show_warnings(request: Request) -> None:
    """Print the warnings of a request on standard error."""
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)
