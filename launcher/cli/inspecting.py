"""The commands for runs that are there: status, logs, stop, checkpoints, ui."""

from pathlib import Path

import click

from launcher.cli.options import example


@click.command(
    short_help="Show runs and how they are doing.",
    epilog=example("outlast status", "outlast status runs/demo-0001 --json"),
)
@click.argument("run_dirs", nargs=-1, metavar="[RUN_DIR…]")
@click.option("--json", "as_json", is_flag=True, help="A JSON list, one object a run.")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
def status(run_dirs: tuple[str, ...], as_json: bool, watch: bool) -> int:
    """Show runs: state, step, loss, speed, last checkpoint, restarts. Default: all of $OUTLAST_RUNS.

    A sweep's folder stands for all of its runs.
    """
    import json

    from gpt.run.run_dir import RunDir
    from launcher.commands.status import show, statuses
    from launcher.paths import absolute
    from launcher.runs.store import list_runs, open_run, runs_folder
    from launcher.runs.sweep_index import sweep_runs

    def find() -> list[RunDir]:
        named = [sweep_runs(absolute(folder)) or [open_run(folder)] for folder in run_dirs]
        return [run for several in named for run in several] or list_runs()

    if as_json and watch:
        raise click.UsageError("--watch shows the table again and again; --json is for one look")
    if as_json:
        click.echo(json.dumps([row.as_json() for row in statuses(find())], indent=2))
    elif watch or find():
        show(find, watch=watch)
    else:
        click.echo(f"no runs in {runs_folder()}", err=True)
    return 0


@click.command(
    short_help="Print what the processes wrote.", epilog=example("outlast logs runs/demo-0001 --follow")
)
@click.argument("run_dir")
@click.option("--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--attempt", type=int, metavar="N", help="Default: the newest.")
@click.option("--node", type=int, metavar="N", help="Default: all.")
def logs(run_dir: str, follow: bool, attempt: int | None, node: int | None) -> int:
    """Print what the processes of a run wrote, each line with its origin."""
    from launcher.commands.logs import lines
    from launcher.runs.store import open_run

    for line in lines(open_run(run_dir), follow=follow, attempt=attempt, node=node):
        click.echo(line)
    return 0


@click.command(short_help="Save and stop a run.", epilog=example("outlast stop runs/demo-0001"))
@click.argument("run_dir")
@click.option("--now", is_flag=True, help="End it at once, without saving.")
def stop(run_dir: str, now: bool) -> int:
    """Save and stop a run; `outlast resume` continues it."""
    from launcher.commands.launch import stop

    return stop(run_dir, now=now)


@click.command(
    short_help="List, pin and delete checkpoints.",
    epilog=example(
        "outlast checkpoints runs/demo-0001 --check", "outlast checkpoints runs/demo-0001 --pin 60"
    ),
)
@click.argument("run_dir")
@click.option("--pin", type=int, multiple=True, metavar="STEP", help="Keep it whatever retention says.")
@click.option("--unpin", type=int, multiple=True, metavar="STEP", help="Leave it to retention again.")
@click.option("--delete", type=int, multiple=True, metavar="STEP", help="Delete it; two stay always.")
@click.option(
    "--delete-set-aside", is_flag=True, help="Delete bad ones, and those that `resume --step` put aside."
)
@click.option("--check", is_flag=True, help="Read every byte now; exit 1 if one is bad.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list, one object a checkpoint.")
def checkpoints(
    run_dir: str,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    delete: tuple[int, ...],
    delete_set_aside: bool,
    check: bool,
    as_json: bool,
) -> int:
    """List a run's checkpoints: step, size, when, by how many processes, pinned or not, verified or not."""
    from launcher.commands.checkpoints import checkpoints
    from launcher.runs.store import open_run

    return checkpoints(
        open_run(run_dir),
        pin=pin,
        unpin=unpin,
        delete=delete,
        delete_set_aside=delete_set_aside,
        check=check,
        as_json=as_json,
    )


@click.command(
    short_help="Open the MLflow UI.", epilog=example("outlast ui", "outlast ui runs/demo-0001 --port 5001")
)
@click.argument("folder", required=False, metavar="[RUN_DIR | RUNS_DIR]", type=click.Path(path_type=Path))
@click.option("--port", type=int, default=5000, show_default=True)
def ui(folder: Path | None, port: int) -> int:
    """Open the MLflow UI over the tracked runs of a folder; default: $OUTLAST_RUNS."""
    from launcher.commands.model_tools import ui

    return ui(folder, port)
