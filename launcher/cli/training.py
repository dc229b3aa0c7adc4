"""The commands that plan and start training: demo, plan, launch, resume, rehearse, sweep."""

from pathlib import Path

import click

from launcher.cli.options import (
    RUN_HELP,
    UserPath,
    cluster_option,
    detach_option,
    example,
    mfu_option,
    nodes_option,
    processes_option,
    set_option,
)


@click.command(
    short_help="Train a small model, kill it, watch it recover.", epilog=example("outlast demo --out demo")
)
@click.option(
    "--out",
    type=UserPath(),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="The folder for the demo's data and run.",
)
def demo(out: Path) -> int:
    """Prepare data, train a small GPT, kill a worker, recover, and sample text.

    Takes a few minutes on a CPU and needs no network.
    """
    from launcher.commands.demo import demo

    return demo(out)


@click.command(
    short_help="Show the memory, time and disk that a run needs.",
    epilog=example("outlast plan llama-1b --cluster slurm-h100 --days 14 --price-per-gpu-hour 2.50"),
    help="Show what a run needs: steps, compute, time, memory per rank, disk, and the memory of other "
    f"settings. Starts nothing and needs no data. {RUN_HELP}",
)
@click.argument("run")
@cluster_option
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@mfu_option
@click.option(
    "--trace",
    "is_traced",
    is_flag=True,
    help="Also run one step without GPUs, and show its memory, every collective and every host wait.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="The training tokens of the data, where it is not prepared yet: for the number of epochs.",
)
@click.option(
    "--days",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Also show how many GPUs finish the run in N days.",
)
@click.option(
    "--price-per-gpu-hour",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="Also show what the GPU hours cost, in the currency of PRICE.",
)
def plan(
    run: str,
    cluster: str,
    overrides: tuple[str, ...],
    as_json: bool,
    mfu: float,
    tokens: int | None,
    days: float | None,
    price_per_gpu_hour: float | None,
    is_traced: bool,
) -> int:
    from launcher.commands.plan import print_plan

    return print_plan(
        run,
        cluster,
        overrides,
        as_json=as_json,
        mfu=mfu,
        tokens=tokens,
        days=days,
        price_per_gpu_hour=price_per_gpu_hour,
        is_traced=is_traced,
    )


@click.command(short_help="List the packaged run configs.", epilog=example("outlast recipes"))
def recipes() -> int:
    """List the recipes: packaged run configs, by name, with their size, steps and tokens."""
    from launcher.commands.recipes import list_recipes

    return list_recipes()


@click.command(
    short_help="Print a packaged run config, to begin with.",
    epilog=example("outlast init llama-1b > my.toml"),
)
@click.argument("recipe")
def init(recipe: str) -> int:
    """Print the file of a recipe on standard output, with a [data] table to fill in."""
    from launcher.commands.recipes import print_recipe

    return print_recipe(recipe)


@click.command(
    short_help="Show days and goodput of a run under failures.",
    epilog=example(
        "outlast simulate llama-1b --cluster slurm-h100 --set data.path=data/mine",
        "outlast simulate my-run.toml --cluster my-cluster.toml --history runs/my-run-0001 --spare-nodes 2",
    ),
    help="Simulate a run on a cluster that fails: its days and goodput with their spread, what each change "
    f"is worth, and other numbers of GPUs. Starts nothing. {RUN_HELP}",
)
@click.argument("run")
@cluster_option
@set_option
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Days without any failure.")
@mfu_option
@click.option(
    "--history",
    "histories",
    multiple=True,
    metavar="RUN_DIR",
    help="Take failures, starts and saves from an earlier run. Can be repeated.",
)
@click.option(
    "--failures-per-1000-node-days",
    "failures",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Default: 6.5 (arXiv:2410.21680), corrected by --history.",
)
@click.option("--preemptions-per-day", "preemptions", type=click.FloatRange(min=0), metavar="N")
@click.option("--spare-nodes", type=click.IntRange(min=0), metavar="N", help="Idle nodes of the job.")
@click.option("--queue-minutes", type=click.FloatRange(min=0), metavar="N", help="Default: 30.")
@click.option("--start-seconds", type=click.FloatRange(min=0), metavar="N", help="Default: 60.")
@click.option(
    "--disk-gb-per-s",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How fast each node writes and reads checkpoints.",
)
@click.option("--replicas", type=click.IntRange(20, 10_000), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--plot", type=UserPath(), metavar="FILE", help="Plot goodput against GPUs (.png, .svg).")
def simulate(
    run: str,
    cluster: str,
    overrides: tuple[str, ...],
    days: float | None,
    mfu: float,
    histories: tuple[str, ...],
    failures: float | None,
    preemptions: float | None,
    spare_nodes: int | None,
    queue_minutes: float | None,
    start_seconds: float | None,
    disk_gb_per_s: float,
    replicas: int,
    seed: int,
    as_json: bool,
    plot: Path | None,
) -> int:
    from launcher.commands.simulate import simulate_run
    from launcher.simulation.scenario import DAY_S

    return simulate_run(
        run,
        cluster,
        overrides,
        days=days,
        mfu=mfu,
        histories=histories,
        disk_gb_per_s=disk_gb_per_s,
        changes={
            "node_failure_rate": None if failures is None else failures / 1000 / DAY_S,
            "preemption_rate": None if preemptions is None else preemptions / DAY_S,
            "spare_nodes": spare_nodes,
            "queue_s": None if queue_minutes is None else 60 * queue_minutes,
            "start_s": start_seconds,
        },
        replicas=replicas,
        seed=seed,
        as_json=as_json,
        plot=plot,
    )


@click.command(
    short_help="Check a new run, then train it.",
    epilog=example("outlast launch my-run.toml --cluster local --set batch.micro_batch=4"),
    help="Check everything, then train on this machine or submit to Slurm. The run directory is the last "
    f"line of standard output. {RUN_HELP}",
)
@click.argument("run")
@cluster_option
@set_option
@click.option(
    "--run-dir",
    type=UserPath(),
    metavar="DIR",
    help="The run directory to create. Default: $OUTLAST_RUNS/NAME-NNNN.",
)
@click.option(
    "--from",
    "origin",
    metavar="RUN_DIR[@STEP]",
    help="Start from the weights, optimizer state and step of another run's checkpoint.",
)
@nodes_option
@processes_option
@click.option("--dry-run", is_flag=True, help="Check and print the plan, but write and start nothing.")
@detach_option
def launch(
    run: str,
    cluster: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    origin: str | None,
    nodes: int | None,
    processes: int | None,
    dry_run: bool,
    attend: bool | None,
) -> int:
    from launcher.cluster import ClusterSize
    from launcher.commands.launch import launch

    size = ClusterSize(nodes, processes)
    return launch(run, cluster, overrides, run_dir, origin=origin, dry_run=dry_run, attend=attend, size=size)


@click.command(
    short_help="Continue a run from its newest checkpoint.",
    epilog=example(
        "outlast resume runs/demo-0001 --set schedule.total_steps=400",
        "outlast resume runs/demo-0001 --processes 1",
        "outlast resume s3://bucket/runs/demo-0001",
    ),
)
@click.argument("run_dir")
@click.option("--cluster", metavar="C", help="Default: the cluster that the run used last.")
@nodes_option
@processes_option
@set_option
@click.option(
    "--step",
    type=click.IntRange(min=1),
    metavar="N",
    help="Continue from the checkpoint of step N; later ones are set aside.",
)
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="FIELD",
    help="Allow a change of a field that normally must match (`data`: the data itself). Can be repeated.",
)
@click.option(
    "--trust",
    "is_trusted",
    is_flag=True,
    help="Accept a run directory that other users can write to, or the commands in a mirror's cluster.json.",
)
@detach_option
def resume(
    run_dir: str,
    cluster: str | None,
    nodes: int | None,
    processes: int | None,
    overrides: tuple[str, ...],
    step: int | None,
    allowed: tuple[str, ...],
    is_trusted: bool,
    attend: bool | None,
) -> int:
    """Continue a run from its newest checkpoint, on the same or another number of processes.

    RUN_DIR can also be the run's mirror, a URL or a folder: the run is then copied to $OUTLAST_RUNS first.
    """
    from launcher.cluster import ClusterSize
    from launcher.commands.resume import resume

    size = ClusterSize(nodes, processes)
    return resume(
        run_dir, cluster, overrides, step, attend=attend, allowed=allowed, size=size, is_trusted=is_trusted
    )


@click.command(
    short_help="Test on your cluster that a run survives failures.",
    epilog=example("outlast rehearse gpt2-124m --cluster my-cluster.toml --set data.path=data/mine"),
)
@click.argument("run", metavar="RUN")
@cluster_option
@set_option
@click.option("--run-dir", type=UserPath(), metavar="DIR", help="Default: $OUTLAST_RUNS/rehearsal-NNNN.")
@click.option(
    "--steps",
    type=click.IntRange(min=8),
    default=24,
    show_default=True,
    help="The number of steps of each of the two runs.",
)
def rehearse(run: str, cluster: str, overrides: tuple[str, ...], run_dir: Path | None, steps: int) -> int:
    """Train a short version of RUN twice and compare the results.

    One of the two is killed, recovers, is stopped, and resumes on another number of processes.
    RUN is the name of a recipe or a TOML file.
    """
    from launcher.commands.rehearse import rehearse

    return rehearse(run, cluster, overrides, run_dir, steps)


@click.command(
    short_help="Train a grid of config values.",
    epilog=example("outlast sweep sweep.toml --cluster my-cluster.toml", "outlast sweep runs/sweep-0001"),
)
@click.argument("source", metavar="SWEEP.toml | SWEEP_DIR", type=UserPath(exists=True))
@click.option("--cluster", metavar="C", help="A TOML file, or a name in cluster_configs. Default: local.")
@click.option("--out", type=UserPath(), metavar="DIR", help="Default: $OUTLAST_RUNS/NAME-NNNN.")
@click.option("--results", is_flag=True, help="Start nothing. Show the results, best first.")
@click.option("--json", "as_json", is_flag=True, help="With --results: print a JSON list.")
@click.option("--trust", "is_trusted", is_flag=True, help="Accept a SWEEP_DIR that other users can write to.")
@detach_option
def sweep(
    source: Path,
    cluster: str | None,
    out: Path | None,
    results: bool,
    as_json: bool,
    is_trusted: bool,
    attend: bool | None,
) -> int:
    """Train every combination of the given values: on Slurm as one job array, on this machine one by one.

    Repeat the command with the sweep's folder to start what has not finished.

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
    return sweep(source, cluster, out, attend=attend, is_trusted=is_trusted)
