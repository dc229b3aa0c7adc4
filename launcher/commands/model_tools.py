"""Commands that need torch or MLflow. Each runs in a child process, so the launcher imports neither."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.places import without_credentials
from gpt.run.records import Health, Sidecar, TrackingState
from gpt.run.run_dir import RunDir, is_exported, mlflow_database_in
from launcher.commands.mlflow_server import serve
from launcher.paths import absolute, unwritable_problem, usable_path
from launcher.runs.code_snapshot import python_module
from launcher.runs.sidecar_problems import sidecar_healths, sidecar_problem
from launcher.runs.store import open_run, read_config, runs_folder
from launcher.scheduler.jobs import refuse_while_alive

_STDERR = 2


def sample_command(folder: Path, prompt: str, **options: float | None) -> list[str]:
    """The command that continues `prompt` with the run or the export in `folder`, on standard output.

    `options` are the options of `outlast sample`; None means the default.
    """
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    return python_module("gpt.sample", str(folder), f"--prompt={prompt}", *arguments)


def sample(folder: str, prompt: str, **options: float | None) -> int:
    """Generate text from a run's checkpoint or from an export; the child's exit code."""
    path = usable_path(folder)
    path = path if is_exported(path) else open_run(folder).path
    return subprocess.run(sample_command(path, prompt, **options)).returncode


def export(folder: str, out: Path, step: int | None, dtype: str) -> int:
    """Export a run's checkpoint to a folder that transformers loads; the child's exit code."""
    arguments = [str(open_run(folder).path), str(out), f"--dtype={dtype}"]
    if (problem := unwritable_problem(absolute(out))) is not None:
        raise ConfigError(f"{problem} Name another folder for the export.")
    if step is not None:
        arguments.append(f"--step={step}")
    return subprocess.run(python_module("gpt.export", *arguments)).returncode


def tracking_uri(folder: Path) -> str:
    """The MLflow URI of the run in `folder`, or of the runs in it."""
    if RunDir(folder).config.exists():
        run = open_run(folder)
        uri = read_config(run).tracking.uri
        return uri if uri is not None else f"sqlite:///{run.mlflow_database}"
    return f"sqlite:///{mlflow_database_in(folder)}"


def sync(folders: Sequence[str]) -> int:
    """Send what MLflow has not received of runs without a job; 1 if it does not take all of it."""
    code = 0
    for folder in folders:
        run = open_run(folder)
        if not read_config(run).tracking.enabled:
            raise LaunchError(
                f"{run.path} is not tracked in MLflow: its config has tracking.enabled = false."
            )
        refuse_while_alive(run)
        begun = time.time()
        subprocess.run(python_module("gpt.sidecars.mlflow", str(run.path), "--last-pass"), stdout=_STDERR)
        now = sidecar_healths(run).get(Sidecar.TRACKING)
        if now is None or now.time < begun:
            raise LaunchError(f"{run.path}: the process that sends to MLflow failed; its output is above.")
        if now.health is Health.DONE:
            click.echo(f"{run.path}: MLflow has everything up to step {now.step or 0}")
        else:
            code = 1
            click.echo(f"{run.path}: {sidecar_problem(Sidecar.TRACKING, now)}", err=True)
    return code


def ui(folder: Path | None, port: int) -> int:
    """Serve the MLflow UI until Ctrl-C. If the runs use a tracking server, print its address instead."""
    folder = absolute(folder or runs_folder())
    uri = tracking_uri(folder)
    if uri.startswith(("http://", "https://")):
        click.echo(without_credentials(uri))  # an old run may have a password in it
        return 0
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise LaunchError(
            f"{database} does not exist: no run in {folder} has been tracked yet. "
            "Give a run directory or a folder of runs."
        )
    state = TrackingState.read_or_none(RunDir(folder).tracking)
    return serve(uri, port, state.run_id if state is not None else None)
