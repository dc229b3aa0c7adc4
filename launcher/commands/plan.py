"""`outlast plan`, and what every command that starts a run prints of a checked request: plan and warnings."""

import json
from collections.abc import Sequence

import click

from launcher.preflight.check import examine
from launcher.preflight.plan import ASSUMED_MFU, plan, table
from launcher.request import Request
from launcher.runs.recipes import run_tables


def print_plan(run: str, cluster: str, overrides: Sequence[str], *, as_json: bool, mfu: float) -> int:
    """Print what `run` will need on `cluster`; the exit code."""
    tables, source = run_tables(run, overrides)
    request = examine(tables, source, cluster, None)
    show_warnings(request)
    if as_json:
        needs = plan(request.config, request.cluster, request.train_tokens, mfu)
        click.echo(json.dumps(needs.as_json()))
    else:
        show_plan(request, mfu)
    return 0


def show_plan(request: Request, mfu: float = ASSUMED_MFU, *, err: bool = False) -> None:
    """Print the plan of a request as an aligned table, on standard output or, with `err`, standard error."""
    rows = table(plan(request.config, request.cluster, request.train_tokens, mfu))
    width = max(32, *(len(name) + 2 for name, _ in rows))  # the path of a source can be long
    for name, value in rows:
        click.echo(f"{name:<{width}}{value}", err=err)


def show_warnings(request: Request) -> None:
    """Print the warnings of a request on standard error."""
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)
