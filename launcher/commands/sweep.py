"""`outlast sweep`: one run for each point of a grid over config fields, in Slurm as one array.

    SWEEP_DIR/sweep.json        the points, each with its folder and its values
    SWEEP_DIR/0001_peak_lr=…/   one ordinary run directory per point
    SWEEP_DIR/submission/       submitit's files for the arrays

A sweep is only a list of runs: status, logs, resume and every other command work on each of them. The same
command on SWEEP_DIR starts the runs that have not finished.
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
from gpt.config.alternatives import without_alternatives
from gpt.config.run import RunConfig
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir, mlflow_database_in
from launcher.cluster import ClusterConfig
from launcher.commands.follow_job import follow_job, start_and_follow
from launcher.commands.launch import command_line
from launcher.commands.plan import show_warnings
from launcher.commands.record_follower import RecordFollower
from launcher.commands.signal_guard import held_signals, reason_of
from launcher.commands.status import UNREADABLE, statuses
from launcher.commands.status_table import cell
from launcher.commands.submit import submit_together
from launcher.paths import absolute, moved_folder_problem
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.code_snapshot import job_environment, python_module, snapshot_code
from launcher.runs.recipes import run_tables, with_absolute_paths
from launcher.runs.store import create_run, make_next_run_folder, next_run_folder, read_cluster, read_config
from launcher.runs.sweep_index import SweepIndex, SweepPoint, read_sweep
from launcher.runs.trust import require_own
from launcher.scheduler.jobs import ask_to_stop, claim_start
from launcher.scheduler.protocol import JobState
from launcher.scheduler.registry import scheduler_of

_LARGEST_GRID = 1000  # Slurm's default MaxArraySize is 1001
_OTHER_FILES = 256  # open files of this process besides the claims, at most
_ALIVE = (JobState.RUNNING, "stopping", JobState.PENDING)
_MLFLOW_TIMEOUT_S = 60.0


class SweepConfig(Section):
    """SWEEP.toml."""

    run: str = Field(
        description="The run config: a recipe's name or a TOML file, relative to the caller's directory."
    )
    fixed: dict[str, Any] = Field(
        default_factory=dict, alias="set", description="Values for every run, by the field's dotted name."
    )
    grid: dict[str, Any] = Field(
        description="A list of values for each field that varies; every combination is a run."
    )
    at_once: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="How many runs Slurm may run at the same time. Default: all."
    )

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The grid by dotted field name, even if the file nests it in tables."""
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


def sweep(
    source: Path,
    cluster: str | None,
    folder: Path | None,
    *,
    attend: bool | None,
    is_trusted: bool = False,
) -> int:
    """Launch the sweep of a SWEEP.toml, or continue the one in a SWEEP_DIR; the exit code.

    `is_trusted` says that other users may have written to the SWEEP_DIR.
    """
    if source.is_dir():
        home = RunDir(absolute(source))
        if cluster is not None or folder is not None:
            raise ConfigError("the sweep already has its --cluster and --out; give only its folder.")
        if (problem := moved_folder_problem(home.path)) is not None:
            raise ConfigError(problem)
        for run in (home, *(RunDir(home.path / point.folder) for point in _index(home.path).points)):
            require_own(run, is_trusted=is_trusted)
    else:
        home = _create(source, cluster or "local", folder)
    code = _run(home, attend)
    click.echo(home.path)
    return code


def show_results(folder: Path, *, as_json: bool = False) -> None:
    """Print a sweep's points and their losses, the best validation loss first."""
    points = _index(folder).points
    found = statuses([RunDir(folder / point.folder) for point in points])
    rows = sorted(
        zip(points, found, strict=True),
        key=lambda row: float("inf") if row[1].val_loss is None else row[1].val_loss,
    )
    if as_json:
        click.echo(json.dumps([{"fields": point.fields, **now.as_json()} for point, now in rows], indent=2))
        return
    names = list(points[0].fields) if points else []
    table = Table(box=None, pad_edge=False)
    for heading in ("run", *names, "state", "step", "loss", "val loss"):
        table.add_column(cell(heading), no_wrap=True)
    for point, now in rows:
        numbers = ("–" if loss is None else f"{loss:.4f}" for loss in (now.loss, now.val_loss))
        is_readable = now.state != UNREADABLE
        table.add_row(
            cell(point.folder.partition("_")[0]),
            *(cell(str(point.fields.get(name, "–"))) for name in names),
            cell(now.state if is_readable else f"{UNREADABLE}: {now.reason}"),
            f"{now.step}/{now.total_steps}" if is_readable else "–",
            *numbers,
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    console.print(table)


def _create(path: Path, cluster: str, folder: Path | None) -> RunDir:
    """Check every point, then create all run directories. Raises ConfigError with all the problems."""
    config = validate(SweepConfig, read_toml(path), path.name)
    is_named = folder is not None
    home = RunDir(absolute(folder or next_run_folder(path.stem), "--out"))
    if home.path.exists() and (not home.path.is_dir() or any(home.path.iterdir())):
        raise ConfigError(
            f"{home.path} exists and is not an empty folder. `outlast sweep {home.path}` continues it."
        )
    points = points_of(config)
    requests = examine_points(config, points, cluster, home.path)
    show_warnings(requests[0])
    if is_named:
        home.path.mkdir(parents=True, exist_ok=True)
    else:
        home = RunDir(make_next_run_folder(path.stem))
    snapshot_code(home)
    tracking = requests[0].config.tracking
    parent = _mlflow_parent(home, tracking.uri, tracking.experiment) if tracking.enabled else None
    for point, request in zip(points, requests, strict=True):
        run_config = request.config
        if parent is not None:
            run_config = _with_mlflow_parent(run_config, parent)
        made = Request(run_config, request.cluster, request.manifests, request.warnings)
        create_run(home.path / point.folder, made, command_line())
    index = SweepIndex(at_once=config.at_once, points=tuple(points))
    write_json(home.sweep, index.model_dump(mode="json"))
    click.echo(f"{len(points)} runs in {home.path}", err=True)
    return home


def examine_points(
    config: SweepConfig, points: Sequence[SweepPoint], cluster: str, folder: Path
) -> list[Request]:
    """The launch of every point, into a folder below `folder`. Raises ConfigError with all the problems."""
    problems: dict[str, None] = {}
    requests = []
    where: str | ClusterConfig = cluster
    for point in points:
        try:
            tables, source = run_tables(config.run, [])
            fields = {**dict(dotted(config.fixed)), **point.fields}
            tables = with_absolute_paths(with_fields(without_alternatives(tables, fields), fields))
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
            click.echo("no run is left to start", err=True)
            show_results(home.path)
            return code
        scheduler = scheduler_of(read_cluster(waiting[0]).kind)
        if scheduler.runs_here:
            code = _one_after_the_other(waiting) or code
            show_results(home.path)
            return code
        with held_signals() as held:
            jobs = submit_together(waiting, "sweep", home, _index(home.path).at_once)
            is_stopping = bool(held)  # a signal during the submission asks all the runs to stop
            for run in waiting if is_stopping else ():
                ask_to_stop(run, reason_of(held[0]), lambda sentence: click.echo(sentence, err=True))
            held.clear()
    click.echo(
        f"submitted: {len(jobs)} runs as {scheduler.title} jobs {jobs[0].job_id} to {jobs[-1].job_id}; "
        f"`outlast status {home.path}` shows them, `outlast sweep {home.path} --results` their losses",
        err=True,
    )
    if attend or is_stopping:
        for run, job in zip(waiting, jobs, strict=True):
            outcome = follow_job(run, job, RecordFollower(run), read_config(run).total_steps)
            if is_stopping:
                code = ExitCode.STOPPED
            elif outcome.exit_code == ExitCode.STOPPED:
                click.echo("the other runs go on; `outlast stop RUN_DIR` ends one", err=True)
                break
        show_results(home.path)
    return code


def _claimed(runs: Sequence[RunDir], claims: ExitStack) -> tuple[list[RunDir], dict[Path, str]]:
    """The runs to start, each claimed until `claims` is closed, and the reason why others cannot start.

    A run that is finished or that already has a job is in neither.
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
        if now.state == UNREADABLE:
            left_out[run.path] = now.reason or ""
        elif now.state == JobState.UNKNOWN:
            left_out[run.path] = f"it is not known here whether its job {now.job_id} has ended ({now.reason})"
        elif now.state not in _ALIVE and (now.checkpoint_step or 0) < now.total_steps:
            waiting.append(run)
    return waiting, left_out


def _one_after_the_other(runs: Sequence[RunDir]) -> int:
    """Run them all. STOPPED if the user stopped one, which ends the sweep, else the last failure's code."""
    code = ExitCode.FINISHED
    for number, run in enumerate(runs, 1):
        click.echo(f"[{number}/{len(runs)}] {run.path.name}", err=True)
        outcome = start_and_follow(run, read_config(run).total_steps, "sweep")
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
    """Every combination of the grid's values; the last field varies fastest."""
    points = []
    for number, values in enumerate(itertools.product(*config.axes.values()), 1):
        fields = dict(zip(config.axes, values, strict=True))
        values_in_name = [f"{name.rpartition('.')[2]}={_in_name(value)}" for name, value in fields.items()]
        points.append(SweepPoint(folder="_".join([f"{number:04d}", *values_in_name])[:120], fields=fields))
    return points


def _in_name(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-")


def _with_mlflow_parent(config: RunConfig, parent: str) -> RunConfig:
    tables = config.model_dump(mode="json", exclude_none=True)
    return RunConfig.model_validate({**tables, "tracking": {**tables["tracking"], "parent": parent}})


def _mlflow_parent(home: RunDir, uri: str | None, experiment: str) -> str | None:
    """The MLflow run that groups the runs of the sweep; None, with a warning, if it cannot be created."""
    address = uri or f"sqlite:///{mlflow_database_in(home.path.resolve().parent)}"
    command = python_module("gpt.sidecars.mlflow_parent", address, experiment, home.path.name)
    try:
        made = subprocess.run(
            command, env=job_environment(home), capture_output=True, text=True, timeout=_MLFLOW_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        made = None
    if made is None or made.returncode != 0:
        click.echo(
            f"warning: {address} does not answer; MLflow will not group the runs of the sweep", err=True
        )
        return None
    return made.stdout.split()[-1]
