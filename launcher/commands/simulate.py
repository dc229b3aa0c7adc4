"""`outlast simulate`: the days and the goodput of a run under failures, and what each change is worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

import click
import numpy as np

from data_pipeline.errors import ConfigError
from launcher.cluster import ClusterConfig
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.preflight.plan import plan
from launcher.request import Request
from launcher.runs.recipes import run_tables
from launcher.runs.store import open_run, read_cluster
from launcher.simulation.estimate import levers, scenario_of
from launcher.simulation.history import History, history_of
from launcher.simulation.scenario import DAY_S, Scenario
from launcher.simulation.simulate import CATEGORIES, Outcome, simulate

SCALES = (8, 64, 512, 4096, 16384, 100_000)
_LABELS = {
    "repeated": "computed again after a failure",
    "saving": "stopped by saves",
    "detecting": "failed, not noticed yet",
    "queueing": "waiting for a job",
    "starting": "starting and loading",
}


def simulate_run(
    run: str,
    cluster: str,
    overrides: Sequence[str],
    *,
    days: float | None,
    mfu: float,
    histories: Sequence[str],
    disk_gb_per_s: float,
    changes: Mapping[str, Any],
    replicas: int,
    seed: int,
    as_json: bool,
    plot: Path | None,
) -> int:
    """Simulate `run` on `cluster` and print what was found; the exit code."""
    if plot is not None:
        plot = absolute(plot, "--plot")
    tables, source = run_tables(run, overrides)
    request = examine(tables, source, cluster, None)
    earlier = [open_run(folder) for folder in histories]
    history = history_of((run_dir, read_cluster(run_dir).nodes) for run_dir in earlier)
    work_s = _work_s(request, days, mfu)

    def on(nodes: int) -> Scenario:
        """The scenario of the same work on another number of nodes."""
        share_s = work_s * request.cluster.nodes / nodes
        processes = request.cluster.processes
        found = scenario_of(request.config, nodes, processes, share_s, history, disk_gb_per_s * 1e9)
        return replace(found, **{name: value for name, value in changes.items() if value is not None})

    scenario = on(request.cluster.nodes)
    outcome = simulate(scenario, replicas, seed)
    gains = [(lever.name, simulate(lever.scenario, replicas, seed)) for lever in levers(scenario)]
    per_node = request.cluster.gpus_per_node or request.cluster.processes
    scales = [
        (count, on(-(-count // per_node)))
        for count in sorted({*SCALES, request.cluster.world_size})
        if count >= per_node
    ]
    few = max(20, replicas // 4)
    scaled = [
        (count, at, simulate(at, few, seed), simulate(replace(at, interval_s=None), few, seed))
        for count, at in scales
    ]
    if plot is not None:
        _plot(plot, scaled, "GPUs" if request.cluster.gpus_per_node else "processes")
    if as_json:
        click.echo(json.dumps(_as_json(scenario, outcome, gains, scaled)))
        return 0
    _show(request.cluster, scenario, outcome, history)
    _show_levers(outcome, gains)
    _show_scales(scaled, "GPUs" if request.cluster.gpus_per_node else "processes")
    if plot is not None:
        click.echo(f"\nThe plot is in {plot}.")
    return 0


def _work_s(request: Request, days: float | None, mfu: float) -> float:
    if days is not None:
        return days * DAY_S
    needs = plan(request.config, request.cluster, request.train_tokens, mfu)
    if needs.days is None:
        raise ConfigError(
            "how long the run takes without failures is not known: the cluster file names no accelerator. "
            "Set `accelerator` there, or give --days"
        )
    return needs.days * DAY_S


def _show(cluster: ClusterConfig, scenario: Scenario, outcome: Outcome, history: History) -> None:
    observed = f"{history.failures} failures observed" if history.node_seconds else "from arXiv:2410.21680"
    rows = [
        (
            "nodes",
            f"{scenario.nodes:,} with {cluster.processes} processes each, {scenario.spare_nodes} spare",
        ),
        ("time without failures", f"{scenario.work_s / DAY_S:.2f} days"),
        (
            "failures",
            f"{scenario.node_failure_rate * DAY_S * 1000:.1f} in 1,000 node-days ({observed}): one every "
            f"{_time(1 / scenario.failure_rate) if scenario.failure_rate else '∞'}",
        ),
        (
            "saves",
            f"every {_time(scenario.save_interval_s)}, each stops the training for {_time(scenario.stall_s)} "
            f"and is committed after {_time(scenario.save_s)}",
        ),
        (
            "recovery",
            f"{_time(scenario.detect_s)} to notice a crash, {_time(scenario.hang_s)} a hang; "
            f"{_time(scenario.start_s)} to start, {_time(scenario.load_s)} to load; "
            f"{_time(scenario.queue_s)} in the queue",
        ),
        ("", ""),
        ("days", _spread(outcome.wall_s / DAY_S, "{:.2f}")),
        ("goodput", _spread(100 * outcome.goodput, "{:.1f}%")),
        ("interruptions", f"{outcome.interruptions.mean():,.1f}"),
    ]
    if outcome.has_ended:
        shares = [(f"  {_LABELS[name]}", outcome.share(name)) for name in CATEGORIES if name in _LABELS]
        rows += [(name, f"{100 * share:.2f}%") for name, share in shares if share > 0]
    for name, value in rows:
        click.echo(f"{name:<34}{value}".rstrip())


def _show_levers(outcome: Outcome, gains: Sequence[tuple[str, Outcome]]) -> None:
    click.echo(f"\n{'what a change is worth':<46}{'goodput':>9}{'days saved':>12}")
    for name, changed in sorted(gains, key=lambda gain: -float(gain[1].goodput.mean())):
        gained = 100 * (changed.goodput.mean() - outcome.goodput.mean())
        saved = (outcome.wall_s.mean() - changed.wall_s.mean()) / DAY_S
        shown = f"{saved:+.2f}" if isfinite(saved) else "–"
        click.echo(f"  {name:<44}{gained:>+9.2f}{shown:>12}")


def _show_scales(scaled: Sequence[tuple[int, Scenario, Outcome, Outcome]], unit: str) -> None:
    click.echo("\nthe same work on other numbers of processors, as fast for each")
    click.echo(f"{unit:>9}{'days':>10}{'goodput':>10}{'a failure every':>18}{'a save every':>15}", nl=False)
    click.echo(f"{'goodput with the best interval':>33}")
    for count, scenario, outcome, best in scaled:
        days = f"{outcome.wall_s.mean() / DAY_S:.2f}" if outcome.has_ended else "never"
        interval_s = replace(scenario, interval_s=None).save_interval_s
        click.echo(
            f"{count:>9,}{days:>10}{100 * outcome.goodput.mean():>9.1f}%"
            f"{_time(1 / scenario.failure_rate) if scenario.failure_rate else '∞':>18}"
            f"{_time(scenario.save_interval_s):>15}{100 * best.goodput.mean():>20.1f}% ({_time(interval_s)})"
        )


def _spread(values: Any, form: str) -> str:
    """The mean, and the range of nine replicas in ten."""
    if not np.isfinite(values).all():
        return "the run would not end: it fails faster than it makes progress"
    low, high = np.quantile(values, [0.05, 0.95])
    return f"{form.format(values.mean())} (90% of the runs: {form.format(low)} to {form.format(high)})"


def _time(seconds: float) -> str:
    for unit, name in ((DAY_S, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"


def _as_json(
    scenario: Scenario,
    outcome: Outcome,
    gains: Sequence[tuple[str, Outcome]],
    scaled: Sequence[tuple[int, Scenario, Outcome, Outcome]],
) -> dict[str, Any]:
    return {
        "scenario": {**asdict(scenario), "save_interval_s": scenario.save_interval_s},
        **_numbers(outcome),
        "shares": {name: outcome.share(name) for name in CATEGORIES} if outcome.has_ended else None,
        "levers": [{"change": name, **_numbers(changed)} for name, changed in gains],
        "scales": [
            {"processes": count, **_numbers(found), "best_interval": _numbers(best)}
            for count, _, found, best in scaled
        ],
    }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    """The distribution of days and goodput; null for days that never end."""
    low, high = np.quantile(outcome.goodput, [0.05, 0.95])
    days = outcome.wall_s / DAY_S
    ends = outcome.has_ended
    return {
        "days": float(days.mean()) if ends else None,
        "days_5_to_95": [float(q) for q in np.quantile(days, [0.05, 0.95])] if ends else None,
        "goodput": float(outcome.goodput.mean()),
        "goodput_5_to_95": [float(low), float(high)],
        "interruptions": float(outcome.interruptions.mean()),
    }


def _plot(path: Path, scaled: Sequence[tuple[int, Scenario, Outcome, Outcome]], unit: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    counts = [count for count, *_ in scaled]
    goodput = np.array([100 * outcome.goodput for _, _, outcome, _ in scaled])
    axes.fill_between(
        counts, *np.quantile(goodput, [0.05, 0.95], axis=1), alpha=0.25, label="90% of the runs"
    )
    axes.plot(counts, goodput.mean(axis=1), marker="o", label="mean")
    best = [100 * outcome.goodput.mean() for *_, outcome in scaled]
    axes.plot(counts, best, linestyle="--", label="mean with the best interval")
    axes.set(xscale="log", xlabel=unit, ylabel="goodput (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path}: {error}. Give a .png, .svg or .pdf file in a folder that exists"
        ) from None
    finally:
        pyplot.close(figure)
