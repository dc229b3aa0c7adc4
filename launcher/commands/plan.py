"""`outlast plan`, and what every command that starts a run prints of a checked request: plan and warnings."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from launcher.commands.trace import dry_step
from launcher.preflight.alternatives import GpuCount, Setting, gpus_for, settings
from launcher.preflight.check import examine
from launcher.preflight.plan import ASSUMED_MFU, plan, table
from launcher.preflight.trace import trace_json, trace_lines
from launcher.request import Request
from launcher.runs.recipes import run_tables
from launcher.units import size


def print_plan(
    run: str,
    cluster: str,
    overrides: Sequence[str],
    *,
    as_json: bool,
    mfu: float,
    tokens: int | None = None,
    days: float | None = None,
    price_per_gpu_hour: float | None = None,
    is_traced: bool = False,
) -> int:
    """Print what `run` will need on `cluster`; the exit code.

    `tokens` is the size of the data where there is none yet; `days` asks for the GPUs that finish in time.
    With `is_traced` a dry step is taken too.
    """
    tables, source = run_tables(run, overrides)
    request = examine(tables, source, cluster, None)
    config, cluster_config = request.config, request.cluster
    show_warnings(request)
    data = request.train_tokens or ((tokens,) if tokens is not None else None)
    count = gpus_for(days, config, cluster_config, mfu) if days is not None else None
    needs = plan(config, cluster_config, data, mfu, price_per_gpu_hour)
    others = settings(config, cluster_config)
    step = dry_step(request) if is_traced else None
    if as_json:
        more: dict[str, Any] = {"gpus_for_days": asdict(count)} if count is not None else {}
        if step is not None:
            more["trace"] = trace_json(step, config, cluster_config, mfu)
        click.echo(json.dumps({**needs.as_json(), "settings": [asdict(other) for other in others], **more}))
        return 0
    rows = [*table(needs), *([_gpu_row(days, count)] if days is not None and count is not None else [])]
    _print_rows(rows)
    click.echo("\npeak memory per rank with other settings (* this run):")
    for other in others:
        click.echo(_setting_row(other))
    if step is not None:
        click.echo()
        for line in trace_lines(step, config, cluster_config, mfu):
            click.echo(line)
    return 0


def show_plan(request: Request, mfu: float = ASSUMED_MFU, *, err: bool = False) -> None:
    """Print the plan of a request as an aligned table, on standard output or, with `err`, standard error."""
    _print_rows(table(plan(request.config, request.cluster, request.train_tokens, mfu)), err=err)


def show_warnings(request: Request) -> None:
    """Print the warnings of a request on standard error."""
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_rows(rows: Sequence[tuple[str, str]], *, err: bool = False) -> None:
    width = max(32, *(len(name) + 2 for name, _ in rows))  # the path of a source can be long
    for name, value in rows:
        click.echo(f"{name:<{width}}{value}", err=err)


def _gpu_row(days: float, count: GpuCount) -> tuple[str, str]:
    return f"GPUs for {days:g} days", f"{count.gpus} ({count.nodes} nodes), {count.days:.2f} days"


def _setting_row(setting: Setting) -> str:
    mark = "*" if setting.is_own else " "
    fits = {None: "", True: "fits", False: "does not fit"}[setting.fits]
    name = f"{mark} zero.stage = {setting.stage}, model.recompute = {setting.recompute}"
    return f"{name:<46}{size(setting.peak):>10}  {fits}".rstrip()
