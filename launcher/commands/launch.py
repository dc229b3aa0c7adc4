"""The commands that start, continue and end runs: launch, resume, stop.

Each checks everything first, then writes, then submits; whatever is refused is refused before a file is
touched. Training itself happens in processes that outlive the command.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from data_pipeline.config_file import with_overrides
from data_pipeline.dataset.manifest import joint_fingerprint
from data_pipeline.durable import fsync_folder
from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.remote import is_remote
from data_pipeline.sampling.skip_list import SkipList
from gpt.checkpoint.format import BadFile, CheckpointIndex, Corrupt, committed, read_index, verify
from gpt.checkpoint.mirror import Mirror
from gpt.config.resume_rules import config_fingerprint
from gpt.config.run import RunConfig
from gpt.run.events import Event, earlier_config_fingerprints, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json
from gpt.run.records import Job
from gpt.run.run_dir import REWOUND_PREFIX, RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.config_changes import DATA, fingerprint_changes, judge
from launcher.commands.fork import find_origin, plant, state_misfits
from launcher.commands.progress import Follower, outcome_of, watch
from launcher.commands.submit import submit
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.preflight.plan import ASSUMED_MFU, plan, table
from launcher.request import Request
from launcher.runs.job_record import read_job
from launcher.runs.mirror import fetch_newer, fetch_run
from launcher.runs.recipes import run_tables, with_absolute_paths
from launcher.runs.stop_request import request_stop
from launcher.runs.store import (
    changed_fields,
    create_run,
    next_run_folder,
    open_run,
    put_submission,
    read_cluster,
    read_config,
    runs_folder,
)
from launcher.scheduler.jobs import JobWatcher, claim_start, job_state, refuse_while_alive
from launcher.scheduler.registry import scheduler_of

_POLL_S = 0.2
_SILENCE_S = 120.0  # a controller restarts in less


def launch(
    run: str,
    cluster: str,
    overrides: Sequence[str],
    folder: Path | None,
    *,
    origin: str | None,
    dry_run: bool,
    attend: bool | None,
) -> int:
    """Check, make the run directory, submit; the exit code.

    `origin` is the RUN_DIR[@STEP] to begin from. `attend` None: stay with a local job only.
    """
    tables, source = run_tables(run, overrides)
    folder = absolute(folder or next_run_folder(str(tables.get("name", "run"))))
    request = examine(tables, source, cluster, folder)
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
    made = create_run(folder, request, command_line())
    if start is not None:
        plant(start, made, request.config, joint_fingerprint(request.manifests))
        parent = start.folder.parent.parent.name
        record_event(made.events, Event.FORKED, run=parent, step=start.index.step)
    return _submit_and_attend(made, request.config.total_steps, request.cluster, "launch", attend)


def resume(
    folder: str,
    cluster: str | None,
    overrides: Sequence[str],
    step: int | None,
    *,
    attend: bool | None,
    allowed: Sequence[str] = (),
) -> int:
    """Continue a run from its newest checkpoint, or from `step`; the exit code.

    `allowed` are fields that may change although they must match.
    """
    run = fetch_run(folder, runs_folder()) if is_remote(folder) else open_run(folder)
    with claim_start(run) as claim:
        return _resume(run, cluster, overrides, step, attend, allowed, claim)


def _resume(
    run: RunDir,
    cluster: str | None,
    overrides: Sequence[str],
    step: int | None,
    attend: bool | None,
    allowed: Sequence[str],
    claim: TextIO,
) -> int:
    refuse_while_alive(run)
    before = read_json(run.config) or {}
    # config.json holds a total in one of two ways; asking for the other replaces it.
    tables = with_absolute_paths(with_overrides(_without_other_total(before, overrides), overrides))
    where = cluster if cluster is not None else read_cluster(run)
    request = examine(tables, "config.json", where, run.path, is_new=False)
    after = request.config.model_dump(mode="json", exclude_none=True)
    # As this version reads it: a field that is new since then has its default on both sides.
    present = read_config(run)
    changes = changed_fields(present.model_dump(mode="json", exclude_none=True), after)
    mirror = request.config.checkpoint.mirror
    if mirror is not None:
        fetch_newer(run, mirror, step)
    checkpoints = dict(committed(run.checkpoints))
    newest = max(checkpoints, default=0)
    index = _index(checkpoints.get(newest if step is None else step))
    data = joint_fingerprint(request.manifests)
    configs = {config_fingerprint(present), *earlier_config_fingerprints(run.events)}
    changes |= fingerprint_changes(index, request.config, data, configs)
    judge(changes, allowed)
    if index is not None and (problems := state_misfits(index, request.config)):
        raise ConfigError([f"step {index.step} does not fit this config: {problem}" for problem in problems])
    if step is None and newest >= request.config.total_steps:
        bad = next(verify(checkpoints[newest]), None)
        if bad is None:
            click.echo(f"finished already: step {newest} of {request.config.total_steps}", err=True)
            click.echo(run.path)
            return 0
        click.echo(f"the last checkpoint is bad, its steps are taken again: {_where(bad)}", err=True)
    if "data.skip" in changes and index is not None:
        _refuse_late_skips(request.config, index)
    if index is not None and DATA in changes:
        request = _accepting(request, index.data_fingerprint)
    if step is not None:
        _rewind(run, step, mirror)
    show_warnings(request)
    if changes:
        # Of the checkpoint to go on from; where that is bad, an older one is of the config as it was.
        came_from = index.config_fingerprint if index is not None else config_fingerprint(present)
        record_event(run.events, Event.CONFIG_CHANGED, changes=changes, config_fingerprint=came_from)
    put_submission(run, request, command_line())
    return _submit_and_attend(run, request.config.total_steps, request.cluster, "resume", attend, claim)


def stop(folder: str, *, now: bool) -> int:
    """Ask a run to save and stop (`now`: to end without saving) and wait until it has; the exit code."""
    run = open_run(folder)
    job = read_job(run)
    if job is None or job_state(run, job) == "ended":
        raise LaunchError(f"{folder} is not running. `outlast status {folder}` says how it ended.")
    request_stop(run, "outlast stop --now" if now else "outlast stop", now=now)
    click.echo("ending it without saving" if now else "saving, then stopping", err=True)
    watcher = JobWatcher(run, job, serves_stop=True)
    while watcher.state() != "ended":
        if watcher.unknown_s > _SILENCE_S:
            click.echo(
                f"nobody says here how {job.executor} job {job.job_id} of {job.host} stands. The request "
                f"stays: the job ends once it sees {run.stop}; `outlast status {folder}` shows how.",
                err=True,
            )
            return 1
        time.sleep(_POLL_S)
    outcome = outcome_of(run, job)
    click.echo(outcome.cause, err=True)
    # Doing what was asked is success, also when the last step was done before the request was seen.
    return 0 if now or outcome.exit_code in (ExitCode.FINISHED, ExitCode.STOPPED) else outcome.exit_code


def show_plan(request: Request, mfu: float = ASSUMED_MFU) -> None:
    """The plan of a request on standard output, aligned."""
    for name, value in table(plan(request.config, request.cluster, request.train_tokens, mfu)):
        click.echo(f"{name:<32}{value}")


def show_warnings(request: Request) -> None:
    """The warnings of a request on standard error."""
    for warning in request.warnings:
        click.echo(f"warning: {warning}", err=True)


def command_line() -> list[str]:
    """The command as it was typed, for provenance.json."""
    return ["outlast", *sys.argv[1:]]


def _submit_and_attend(
    run: RunDir,
    total_steps: int,
    cluster: ClusterConfig,
    reason: str,
    attend: bool | None,
    claim: TextIO | None = None,
) -> int:
    follower = Follower(run)
    job: Job = submit(run, reason)
    if claim is not None:
        claim.close()  # job.json stands: it refuses the next one
    stays = scheduler_of(cluster.kind).is_attended if attend is None else attend
    code = 0
    if stays:
        outcome = watch(run, job, follower, total_steps)
        code = outcome.exit_code
        click.echo(outcome.cause if code == 0 else f"exit code {code}: {outcome.cause}", err=True)
        if code == ExitCode.STOPPED:
            click.echo(f"`outlast resume {run.path}` continues it", err=True)
    else:
        click.echo(
            f"submitted: {job.executor} job {job.job_id}; `outlast status {run.path}` shows it", err=True
        )
    click.echo(run.path)
    return code


def _without_other_total(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    names = {"schedule.total_steps": "total_tokens", "schedule.total_tokens": "total_steps"}
    given = {override.partition("=")[0].strip() for override in overrides}
    dropped = {other for name, other in names.items() if name in given}
    schedule = {key: value for key, value in tables["schedule"].items() if key not in dropped}
    return {**tables, "schedule": schedule}


def _index(folder: Path | None) -> CheckpointIndex | None:
    """The index of the checkpoint in `folder`, if there is one and it is whole."""
    if folder is None:
        return None
    with suppress(Corrupt):  # the worker names it and takes an older one
        return read_index(folder)
    return None


def _refuse_late_skips(config: RunConfig, index: CheckpointIndex) -> None:
    """Refuse ranges of data.skip that the checkpoint to continue from has read; the worker would too."""
    places = config.batch_sizes.until(index.step)
    SkipList(index.skipped).extended(config.data.skip, index.step, places)


def _accepting(request: Request, fingerprint: str) -> Request:
    """`request` for a run whose checkpoints may come from the data of `fingerprint` too."""
    before = request.config.data
    data = before.model_copy(update={"changed_from": (*before.changed_from, fingerprint)})
    return replace(request, config=request.config.model_copy(update={"data": data}))


def _rewind(run: RunDir, step: int, mirror: str | None) -> None:
    """Make the checkpoint of `step` the newest: later ones are put aside under names that do not count."""
    checkpoints = committed(run.checkpoints)
    steps = [number for number, _ in checkpoints]
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise LaunchError(f"there is no checkpoint of step {step}; there are: {there}.")
    click.echo(f"reading every byte of the checkpoint of step {step}", err=True)
    bad = next(verify(dict(checkpoints)[step]), None)
    if bad is not None:
        there = ", ".join(str(number) for number in steps if number != step) or "none"
        raise LaunchError(f"the checkpoint of step {step} is bad: {_where(bad)}. There are also: {there}.")
    aside = f"{REWOUND_PREFIX}{int(time.time())}-"
    if mirror is not None:
        Mirror.of(run, mirror).set_later_aside(step)
    for number, path in checkpoints:
        if number > step:
            path.rename(path.with_name(aside + path.name))
            click.echo(f"step {number} is put aside as checkpoints/{aside}{path.name}", err=True)
    fsync_folder(run.checkpoints)


def _where(bad: BadFile) -> str:
    return f"{bad.path}: byte {bad.offset}: {bad.reason}"
