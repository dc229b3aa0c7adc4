"""`outlast launch`: checks a new run, makes its run directory, and submits it.

Everything is checked before a file is written. Training itself happens in processes that outlive the command.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.dataset.manifest import joint_fingerprint
from gpt.run.run_dir import RunDir
from launcher.cluster import AS_THE_FILE_SAYS, ClusterSize
from launcher.commands.follow_job import submit_and_follow
from launcher.commands.fork import find_origin, seed_checkpoint
from launcher.commands.plan import show_plan, show_warnings
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.runs.recipes import run_tables
from launcher.runs.store import create_run, make_next_run_folder, next_run_folder
from launcher.scheduler.registry import scheduler_of


def launch(
    run: str,
    cluster: str,
    overrides: Sequence[str],
    folder: Path | None,
    *,
    origin: str | None,
    dry_run: bool,
    attend: bool | None,
    size: ClusterSize = AS_THE_FILE_SAYS,
) -> int:
    """Check the run, make its directory and submit it; the exit code.

    `origin` is the RUN_DIR[@STEP] to start from. `attend` says whether to follow the job;
    None follows a local job only. `size` replaces what the cluster file says.
    """
    tables, source = run_tables(run, overrides)
    name = str(tables.get("name", "run"))
    is_named = folder is not None
    folder = absolute(folder, "--run-dir") if folder is not None else next_run_folder(name)
    request = examine(tables, source, cluster, folder, size=size)
    start = find_origin(origin, request.config) if origin is not None else None
    show_warnings(request)
    if dry_run:
        scheduler = scheduler_of(request.cluster.kind)
        text = scheduler.submission_text(RunDir(folder), request.config, request.cluster)
        if text is not None:
            click.echo(text)
        show_plan(request)
        click.echo("dry run: all checks passed, nothing was written", err=True)
        click.echo(folder)
        return 0
    begins_with = start.event if start is not None else {}
    made = create_run(
        folder if is_named else make_next_run_folder(name), request, command_line(), begins_with
    )
    if start is not None:
        seed_checkpoint(start, made, request.config, joint_fingerprint(request.manifests))
    return submit_and_follow(made, request.config.total_steps, request.cluster, "launch", attend)


def command_line() -> list[str]:
    """The command as it was typed, for provenance.json."""
    return ["outlast", *sys.argv[1:]]
