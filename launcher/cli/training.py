"""The commands that start something to train: demo, plan, launch, resume, rehearse, sweep."""

from pathlib import Path

import click

from launcher.cli.options import RUN_HELP, cluster_option, detach_option, example, set_option


@click.command(
    short_help="See it work: train, kill, restart, sample.", epilog=example("outlast demo --out demo")
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, metavar="DIR"
)
def demo(out: Path) -> int:
    """Prepare, train, kill, restart, sample: the whole road in a few minutes, without a network."""
    from launcher.commands.demo import demo

    return demo(out)


@click.command(
    short_help="Show what a run will need.",
    epilog=example("outlast plan demo --cluster local --set data.path=data/mine"),
    help=f"Show what a run will need: parameters, memory a rank, time, steps, disk. {RUN_HELP}",
)
@click.argument("run")
@cluster_option
@set_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option(
    "--mfu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the accelerators' peak that the time assumes.",
)
def plan(run: str, cluster: str, overrides: tuple[str, ...], as_json: bool, mfu: float) -> int:
    from launcher.commands.plan import print_plan

    return print_plan(run, cluster, overrides, as_json=as_json, mfu=mfu)


@click.command(
    short_help="Check everything, then train.",
    epilog=example("outlast launch my-run.toml --cluster local --set batch.micro_batch=4"),
    help=f"Check everything, then run here or submit; prints the run directory last. {RUN_HELP}",
)
@click.argument("run")
@cluster_option
@set_option
@click.option(
    "--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: $OUTLAST_RUNS/NAME-NNNN."
)
@click.option(
    "--from", "origin", metavar="RUN_DIR[@STEP]", help="Begin with the state of another run's checkpoint."
)
@click.option("--dry-run", is_flag=True, help="Check and plan; start and write nothing.")
@detach_option
def launch(
    run: str,
    cluster: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    origin: str | None,
    dry_run: bool,
    attend: bool | None,
) -> int:
    from launcher.commands.launch import launch

    return launch(run, cluster, overrides, run_dir, origin=origin, dry_run=dry_run, attend=attend)


@click.command(
    short_help="Continue a run.",
    epilog=example(
        "outlast resume runs/demo-0001 --set schedule.total_steps=400",
        "outlast resume s3://bucket/runs/demo-0001",
    ),
)
@click.argument("run_dir")
@click.option("--cluster", metavar="C", help="Default: where it ran last.")
@set_option
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="Continue from an older checkpoint.")
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="FIELD",
    help="Let a field change that must match (`data`: the data itself); may be repeated.",
)
@detach_option
def resume(
    run_dir: str,
    cluster: str | None,
    overrides: tuple[str, ...],
    step: int | None,
    allowed: tuple[str, ...],
    attend: bool | None,
) -> int:
    """Continue a run from its newest checkpoint, also on another number of processes.

    The URL of a mirror in place of RUN_DIR brings the run from there first.
    """
    from launcher.commands.resume import resume

    return resume(run_dir, cluster, overrides, step, attend=attend, allowed=allowed)


@click.command(
    short_help="Prove on your cluster that a run survives.",
    epilog=example("outlast rehearse gpt2-124m --cluster my-cluster.toml --set data.path=data/mine"),
)
@click.argument("run", metavar="RUN")
@cluster_option
@set_option
@click.option("--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: among the runs.")
@click.option(
    "--steps", type=click.IntRange(min=8), default=24, show_default=True, help="Of each of two runs."
)
def rehearse(run: str, cluster: str, overrides: tuple[str, ...], run_dir: Path | None, steps: int) -> int:
    """Train a short version of RUN twice, one of them killed, resumed and resized, and compare."""
    from launcher.commands.rehearse import rehearse

    return rehearse(run, cluster, overrides, run_dir, steps)


@click.command(
    short_help="Run a grid over config fields.",
    epilog=example("outlast sweep sweep.toml --cluster my-cluster.toml", "outlast sweep runs/sweep-0001"),
)
@click.argument("source", metavar="SWEEP.toml | SWEEP_DIR", type=click.Path(path_type=Path, exists=True))
@click.option("--cluster", metavar="C", help="A file, or a name in cluster_configs. Default: local.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Default: among the runs.")
@click.option("--results", is_flag=True, help="Start nothing; show what came out, the best first.")
@click.option("--json", "as_json", is_flag=True, help="With --results: a JSON list.")
@detach_option
def sweep(
    source: Path, cluster: str | None, out: Path | None, results: bool, as_json: bool, attend: bool | None
) -> int:
    """Run every combination of some fields' values: on Slurm as one array, here one after the other.

    \b
    SWEEP.toml:  run = "my-run.toml"
                 [set]
                 data.path = "data/mine"
                 [grid]
                 optimizer.peak_lr = [3e-4, 6e-4]
                 seed = [1, 2]
    """
    from launcher.commands.sweep import show_results, sweep

    if results:
        show_results(source, as_json=as_json)
        return 0
    return sweep(source, cluster, out, attend=attend)
