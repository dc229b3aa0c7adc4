"""The commands for existing runs: status, logs, stop, checkpoints, ui."""

from pathlib import Path

import click

from launcher.cli.options import example


@click.command(
    short_help="Show the state and progress of runs.",
    epilog=example("outlast status", "outlast status runs/demo-0001 --json"),
)
@click.argument("run_dirs", nargs=-1, metavar="[RUN_DIR…]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object per run.")
@click.option("--watch", is_flag=True, help="Refresh every few seconds until Ctrl-C.")
def status(run_dirs: tuple[str, ...], as_json: bool, watch: bool) -> int:
    """Show the state, step, loss, speed, last checkpoint and restarts of runs.

    Without arguments, shows all runs in $OUTLAST_RUNS, each sweep as one row. The folder of a sweep shows
    all its runs.
    """
    import json

    from gpt.run.run_dir import RunDir
    from launcher.commands.status import statuses
    from launcher.commands.status_table import show
    from launcher.paths import absolute
    from launcher.runs.store import list_runs, open_run, runs_folder
    from launcher.runs.sweep_index import sweep_runs

    def find() -> list[RunDir]:
        named = [sweep_runs(absolute(folder)) or [open_run(folder)] for folder in run_dirs]
        return [run for several in named for run in several] or list_runs()

    if as_json and watch:
        raise click.UsageError("--watch refreshes the table and cannot be combined with --json.")
    if as_json:
        click.echo(json.dumps([row.as_json() for row in statuses(find())], indent=2))
    elif watch or find():
        show(find, watch=watch)
    else:
        click.echo(f"There are no runs in {runs_folder()}.", err=True)
    return 0


@click.command(
    short_help="Show where the time of a run went.",
    epilog=example("outlast goodput runs/demo-0001", "outlast goodput runs/demo-0001 --json"),
)
@click.argument("run_dir")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def goodput(run_dir: str, as_json: bool) -> int:
    """Show where the wall-clock time of a run went since it was submitted, in all and by attempt.

    Goodput is the share of the time that went to training steps, without the time at which a person had
    stopped the run.
    """
    from launcher.commands.goodput import show_goodput

    return show_goodput(run_dir, as_json=as_json)


@click.command(
    short_help="Compute steps again and compare them with the record.",
    epilog=example("outlast replay runs/demo-0001 --step 81 --to 90"),
)
@click.argument("run_dir")
@click.option("--step", type=click.IntRange(min=1), required=True, metavar="N", help="The first step.")
@click.option(
    "--to", "last", type=click.IntRange(min=1), metavar="M", help="The last step. Default: N alone."
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="P",
    help="Default: as many as the run had, if this machine has a core for each, else the fewest.",
)
def replay(run_dir: str, step: int, last: int | None, processes: int | None) -> int:
    """Compute steps of a run again on this machine, and compare them with its record.

    The steps start from the nearest earlier checkpoint. Nothing in the run directory changes. The data that
    were read must be equal; loss, gradient norm and rate must be equal up to the rounding of another order of
    sums. The exit code is 0 if they are, 1 if not, and 2 if the steps cannot be computed.
    """
    from launcher.commands.replay import replay

    return replay(run_dir, step, last, processes)


@click.command(short_help="Print the logs of a run.", epilog=example("outlast logs runs/demo-0001 --follow"))
@click.argument("run_dir")
@click.option("--follow", is_flag=True, help="Keep printing new lines until the job ends.")
@click.option("--attempt", type=int, metavar="N", help="The attempt to print. Default: the newest.")
@click.option("--node", type=int, metavar="N", help="The node to print. Default: all.")
def logs(run_dir: str, follow: bool, attempt: int | None, node: int | None) -> int:
    """Print the logs of a run's processes, each line with its origin."""
    from launcher.commands.logs import lines
    from launcher.runs.store import open_run

    for line in lines(open_run(run_dir), follow=follow, attempt=attempt, node=node):
        click.echo(line)
    return 0


@click.command(short_help="Save and stop a run.", epilog=example("outlast stop runs/demo-0001"))
@click.argument("run_dir")
@click.option("--now", is_flag=True, help="Stop at once without saving.")
def stop(run_dir: str, now: bool) -> int:
    """Save a checkpoint and stop the run. `outlast resume` continues it."""
    from launcher.commands.stop import stop

    return stop(run_dir, now=now)


@click.command(
    short_help="List, pin, delete and verify checkpoints.",
    epilog=example(
        "outlast checkpoints runs/demo-0001 --check", "outlast checkpoints runs/demo-0001 --pin 60"
    ),
)
@click.argument("run_dir")
@click.option("--pin", type=int, multiple=True, metavar="STEP", help="Never prune this checkpoint.")
@click.option("--unpin", type=int, multiple=True, metavar="STEP", help="Allow pruning again.")
@click.option(
    "--delete",
    type=int,
    multiple=True,
    metavar="STEP",
    help="Delete this checkpoint. Two intact ones always remain.",
)
@click.option(
    "--delete-set-aside",
    is_flag=True,
    help="Delete the corrupt checkpoints and those that `resume --step` set aside.",
)
@click.option("--check", is_flag=True, help="Verify every byte now. Exits with 1 if a checkpoint is corrupt.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object per checkpoint.")
def checkpoints(
    run_dir: str,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    delete: tuple[int, ...],
    delete_set_aside: bool,
    check: bool,
    as_json: bool,
) -> int:
    """List, pin, unpin, delete and verify the checkpoints of a run."""
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
    short_help="Compare the configs and losses of two runs.",
    epilog=example("outlast compare runs/my-gpt-0001 runs/my-gpt-0002"),
)
@click.argument("first", metavar="RUN_DIR")
@click.argument("second", metavar="RUN_DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(first: str, second: str, as_json: bool) -> int:
    """Show the fields in which the configs of two runs differ, and their losses at the same steps."""
    from launcher.commands.compare import compare_runs

    return compare_runs(first, second, as_json=as_json)


@click.command(
    short_help="Serve the MLflow UI.",
    epilog=example("outlast ui", "outlast ui runs/demo-0001 --port 5001", "outlast ui sync runs/demo-0001"),
)
@click.argument("folders", nargs=-1, metavar="[RUN_DIR | RUNS_DIR | sync RUN_DIR…]")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="The local port to serve on.",
)
def ui(folders: tuple[str, ...], port: int) -> int:
    """Serve the MLflow UI for a run or for a folder of runs. Default: $OUTLAST_RUNS.

    `outlast ui sync RUN_DIR…` sends what MLflow has not received of runs whose job has ended, and serves
    nothing.
    """
    from launcher.commands.model_tools import sync, ui

    if folders[:1] == ("sync",):
        if len(folders) == 1:
            raise click.UsageError("name the run directories to send: outlast ui sync RUN_DIR…")
        return sync(folders[1:])
    if len(folders) > 1:
        raise click.UsageError("name one run directory, or one folder of runs.")
    return ui(Path(folders[0]) if folders else None, port)
