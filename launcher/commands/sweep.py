"""`outlast sweep`: one run for each point of a grid over config fields, as one Slurm array.

    SWEEP_DIR/sweep.json        the points: folder and fields; where they run
    SWEEP_DIR/0001_peak_lr=…/   an ordinary run directory each, for status, logs, resume and the others
    SWEEP_DIR/submission/       submitit's files of the arrays

A sweep is a list of runs and nothing else: every command works on each. The same command on SWEEP_DIR takes
up what has not finished.
"""

import itertools
import json
import re
import resource
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Annotated, Any, Self

import click
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from data_pipeline.config_file import Section, dotted, read_toml, validate, with_fields
from data_pipeline.errors import ConfigError, LaunchError, OutlastError
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir, mlflow_database_in
from launcher.cluster import ClusterConfig
from launcher.commands.follow_job import follow_job
from launcher.commands.launch import command_line
from launcher.commands.plan import show_warnings
from launcher.commands.record_follower import RecordFollower
from launcher.commands.status import statuses
from launcher.commands.submit import submit, submit_together
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.recipes import run_tables, with_absolute_paths
from launcher.runs.store import (
    SweepIndex,
    SweepPoint,
    create_run,
    job_environment,
    next_run_folder,
    python_module,
    read_cluster,
    read_config,
    read_sweep,
    snapshot_code,
)
from launcher.scheduler.jobs import claim_start

_LARGEST_GRID = 1000  # Slurm's default MaxArraySize is 1001
_OTHER_FILES = 256  # that a process has open, at most
_ALIVE = ("running", "stopping", "pending")
_PARENT_PATIENCE_S = 60.0


class SweepConfig(Section):
    """SWEEP.toml."""

    run: str = Field(description="A recipe's name or a TOML file, relative to the caller's directory.")
    fixed: dict[str, Any] = Field(
        default_factory=dict, alias="set", description="Fields of every run, by their dotted names."
    )
    grid: dict[str, Any] = Field(description="Lists of values by field; every combination is a run.")
    at_once: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Runs of the array that Slurm runs at a time. Default: all."
    )

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The grid by dotted field, also where the file wrote it as nested tables."""
        return dict(dotted(self.grid))

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        axes = self.axes
        wrong = [name for name, values in axes.items() if not isinstance(values, list) or not values]
        if wrong or not axes:
            named = ", ".join(f"grid.{name}" for name in wrong) or "grid"
            raise ValueError(
                f"{named}: a list of values is needed, for example optimizer.peak_lr = [3e-4, 6e-4]"
            )
        count = prod(len(values) for values in axes.values())
        if count > _LARGEST_GRID:
            raise ValueError(
                f"grid: {count} combinations are more than {_LARGEST_GRID}; leave some values out"
            )
        return self


def sweep(source: Path, cluster: str | None, folder: Path | None, *, attend: bool | None) -> int:
    """Launch the sweep of a SWEEP.toml, or take up that of a SWEEP_DIR; the exit code."""
    if source.is_dir():
        home = RunDir(absolute(source))
        if cluster is not None or folder is not None:
            raise ConfigError("--cluster and --out are those of the sweep already; give its folder alone.")
    else:
        home = _create(source, cluster or "local", folder)
    code = _run(home, attend)
    click.echo(home.path)
    return code


def show_results(folder: Path, *, as_json: bool = False) -> None:
    """A sweep's points and how they did, the best validation loss first, on standard output."""
    points = _index(folder).points
    found = statuses([RunDir(folder / point.folder) for point in points])
    rows = sorted(
        zip(points, found, strict=True),
        key=lambda row: float("inf") if row[1].val_loss is None else row[1].val_loss,
    )
    if as_json:
        click.echo(json.dumps([{"fields": point.fields, **now.as_json()} for point, now in rows], indent=2))
        return
    names = list(points[0].fields)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", *names, "state", "step", "loss", "val loss"):
        table.add_column(heading, no_wrap=True)
    for point, now in rows:
        numbers = ("–" if loss is None else f"{loss:.4f}" for loss in (now.loss, now.val_loss))
        is_readable = now.state != "unreadable"
        table.add_row(
            point.folder.partition("_")[0],
            *(str(point.fields.get(name, "–")) for name in names),
            now.state if is_readable else f"unreadable: {now.reason}",
            f"{now.step}/{now.total_steps}" if is_readable else "–",
            *numbers,
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print(table)


def _create(path: Path, cluster: str, folder: Path | None) -> RunDir:
    """Check every point, then make all run directories. Raises ConfigError with the problems of all."""
    config = validate(SweepConfig, read_toml(path), path.name)
    home = RunDir(absolute(folder or next_run_folder(path.stem)))
    if home.path.exists() and (not home.path.is_dir() or any(home.path.iterdir())):
        raise ConfigError(
            f"{home.path} exists and is not an empty folder. `outlast sweep {home.path}` continues it."
        )
    points = points_of(config)
    requests = examine_points(config, points, cluster, home.path)
    show_warnings(requests[0])
    home.path.mkdir(parents=True, exist_ok=True)
    snapshot_code(home)
    tracking = requests[0].config.tracking
    parent = _mlflow_parent(home, tracking.uri, tracking.experiment) if tracking.enabled else None
    for point, request in zip(points, requests, strict=True):
        run_config = request.config
        if parent is not None:
            named = run_config.tracking.model_copy(update={"parent": parent})
            run_config = run_config.model_copy(update={"tracking": named})
        made = Request(run_config, request.cluster, request.manifests, request.warnings)
        create_run(home.path / point.folder, made, command_line())
    index = SweepIndex(at_once=config.at_once, points=tuple(points))
    write_json(home.sweep, index.model_dump(mode="json"))
    click.echo(f"{len(points)} runs in {home.path}", err=True)
    return home


def examine_points(
    config: SweepConfig, points: Sequence[SweepPoint], cluster: str, folder: Path
) -> list[Request]:
    """The launch of every point, into folders below `folder`. Raises ConfigError with the problems of all."""
    problems: dict[str, None] = {}
    requests = []
    where: str | ClusterConfig = cluster
    for point in points:
        try:
            tables, source = run_tables(config.run, [])
            fields = {**dict(dotted(config.fixed)), **point.fields}
            tables = with_absolute_paths(with_fields(tables, fields))
            requests.append(examine(tables, source, where, folder / point.folder))
            where = requests[-1].cluster
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError(list(problems))
    return requests


def _run(home: RunDir, attend: bool | None) -> int:
    runs = [RunDir(home.path / point.folder) for point in _index(home.path).points]
    with ExitStack() as claims:
        claims.enter_context(claim_start(home))
        waiting, left_out = _claimed(runs, claims)
        for path, reason in left_out.items():
            click.echo(f"{path.name} is left out: {reason}", err=True)
        code = 1 if left_out else 0
        if not waiting:
            click.echo("nothing is left to start", err=True)
            show_results(home.path)
            return code
        if read_cluster(waiting[0]).kind == "local":
            code = _one_after_the_other(waiting) or code
            show_results(home.path)
            return code
        jobs = submit_together(waiting, "sweep", home, _index(home.path).at_once)
    click.echo(
        f"submitted: {len(jobs)} runs as Slurm jobs {jobs[0].job_id} to {jobs[-1].job_id}; "
        f"`outlast status {home.path}` shows them, `outlast sweep {home.path} --results` what came out",
        err=True,
    )
    if attend:
        for run, job in zip(waiting, jobs, strict=True):
            if (
                follow_job(run, job, RecordFollower(run), read_config(run).total_steps).exit_code
                == ExitCode.STOPPED
            ):
                click.echo("the others go on; `outlast stop RUN_DIR` ends one", err=True)
                break
        show_results(home.path)
    return code


def _claimed(runs: Sequence[RunDir], claims: ExitStack) -> tuple[list[RunDir], dict[Path, str]]:
    """The runs that are to be started, each claimed until `claims` is closed; why others cannot be.

    A run that is finished, or that has a job, is neither.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, len(runs) + _OTHER_FILES)  # a claim is an open file
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    left_out: dict[Path, str] = {}
    claimed = []
    for run in runs:
        try:
            read_cluster(run)
            claims.enter_context(claim_start(run))
            claimed.append(run)
        except (OutlastError, OSError) as error:
            left_out[run.path] = str(error)
    waiting = []
    for run, now in zip(claimed, statuses(claimed), strict=True):
        if now.state == "unreadable":
            left_out[run.path] = now.reason or ""
        elif now.state == "unknown":
            left_out[run.path] = f"nobody says here whether its job {now.job_id} has ended ({now.reason})"
        elif now.state not in _ALIVE and (now.checkpoint_step or 0) < now.total_steps:
            waiting.append(run)
    return waiting, left_out


def _one_after_the_other(runs: Sequence[RunDir]) -> int:
    """Run all. Returns STOPPED when a user stopped one (the sweep ends), else the last failure's code."""
    code = ExitCode.FINISHED
    for number, run in enumerate(runs, 1):
        click.echo(f"[{number}/{len(runs)}] {run.path.name}", err=True)
        follower = RecordFollower(run)
        outcome = follow_job(run, submit(run, "sweep"), follower, read_config(run).total_steps)
        if outcome.exit_code == ExitCode.STOPPED:
            click.echo(f"{outcome.cause}; `outlast sweep {run.path.parent}` continues", err=True)
            return ExitCode.STOPPED
        if outcome.exit_code != ExitCode.FINISHED:
            click.echo(f"{run.path.name} failed: {outcome.cause}", err=True)
            code = outcome.exit_code
    return code


def _index(folder: Path) -> SweepIndex:
    index = read_sweep(folder)
    if index is None:
        raise LaunchError(f"{folder} is not a sweep: it has no {RunDir(folder).sweep.name}.")
    return index


def points_of(config: SweepConfig) -> list[SweepPoint]:
    """Every combination of the grid's values, the last field's fastest."""
    points = []
    for number, values in enumerate(itertools.product(*config.axes.values()), 1):
        fields = dict(zip(config.axes, values, strict=True))
        words = [f"{name.rpartition('.')[2]}={_word(value)}" for name, value in fields.items()]
        points.append(SweepPoint(folder="_".join([f"{number:04d}", *words])[:120], fields=fields))
    return points


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-")


def _mlflow_parent(home: RunDir, uri: str | None, experiment: str) -> str | None:
    """The MLflow run under which those of the sweep stand; None, with a warning, where none can be made."""
    address = uri or f"sqlite:///{mlflow_database_in(home.path)}"
    command = python_module("gpt.sidecars.mlflow_parent", address, experiment, home.path.name)
    try:
        made = subprocess.run(
            command, env=job_environment(home), capture_output=True, text=True, timeout=_PARENT_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        made = None
    if made is None or made.returncode != 0:
        click.echo(f"warning: {address} does not answer; the runs get no common parent in MLflow", err=True)
        return None
    return made.stdout.split()[-1]
