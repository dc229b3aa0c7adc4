"""`outlast resume`: checks what may have changed since the run stopped, then submits it again.

Whatever is refused is refused before a file changes. Training itself happens in processes that outlive the
command.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from data_pipeline.dataset.manifest import joint_fingerprint
from data_pipeline.errors import ConfigError
from data_pipeline.sampling.skip_list import SkipList
from gpt.checkpoint.format import CheckpointIndex, Corrupt, committed, read_index, verify
from gpt.checkpoint.rewind import rewind
from gpt.config.resume_rules import RULES, Change, config_fingerprint, rule_of
from gpt.config.run import RunConfig
from gpt.run.events import Event, earlier_config_fingerprints, record_event
from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from launcher.cluster import AS_THE_FILE_SAYS, ClusterSize
from launcher.commands.config_changes import CONFIG, DATA, check_changes, fingerprint_changes
from launcher.commands.follow_job import submit_and_follow
from launcher.commands.fork import state_misfits
from launcher.commands.launch import command_line
from launcher.commands.plan import show_warnings
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.mirror import fetch_newer, fetch_run, is_mirrored_run
from launcher.runs.recipes import with_settings
from launcher.runs.store import (
    changed_fields,
    open_run,
    put_config,
    put_submission,
    read_cluster,
    read_config,
    refuse_unseeded,
    runs_folder,
)
from launcher.runs.trust import require_own
from launcher.scheduler.jobs import claim_start, refuse_while_alive


def resume(
    folder: str,
    cluster: str | None,
    overrides: Sequence[str],
    step: int | None,
    *,
    attend: bool | None,
    allowed: Sequence[str] = (),
    size: ClusterSize = AS_THE_FILE_SAYS,
    is_trusted: bool = False,
) -> int:
    """Continue a run from its newest checkpoint, or from the one of `step`; the exit code.

    `allowed` names fields that may change although they must match. `is_trusted` says that other users may
    have written to the run directory or to the mirror that `folder` names.
    """
    if is_mirrored_run(folder):
        run = fetch_run(folder, runs_folder(), keeps_cluster=cluster is None, is_trusted=is_trusted)
    else:
        run = open_run(folder)
    require_own(run, is_trusted=is_trusted)
    with claim_start(run) as claim:
        return _resume(run, cluster, overrides, step, attend, allowed, size, claim)


def _resume(
    run: RunDir,
    cluster: str | None,
    overrides: Sequence[str],
    step: int | None,
    attend: bool | None,
    allowed: Sequence[str],
    size: ClusterSize,
    claim: TextIO,
) -> int:
    refuse_while_alive(run)
    request = _request(run, cluster, overrides, size)
    present = read_config(run)
    mirror = request.config.checkpoint.mirror
    if mirror is not None:
        fetch_newer(run, mirror, step)
    refuse_unseeded(run)
    checkpoints = dict(committed(run.checkpoints))
    newest = max(checkpoints, default=0)
    index = _index(checkpoints.get(newest if step is None else step))
    changes = _changes(run, present, request, index)
    misfits = state_misfits(index, request.config) if index is not None else []
    check_changes(changes, allowed, misfits)
    if index is not None and misfits:
        raise ConfigError([f"step {index.step} does not fit this config: {problem}" for problem in misfits])
    if step is None and newest >= request.config.total_steps:
        bad = next(verify(checkpoints[newest]), None)
        if bad is None:
            click.echo(
                f"the run has finished: step {newest} of {request.config.total_steps}. To train longer, add "
                "--set schedule.total_steps=N with a larger N.",
                err=True,
            )
            _store_without_training(run, present, request, changes, index)
            click.echo(run.path)
            return 0
        click.echo(f"the last checkpoint is corrupt; its steps are trained again: {bad}", err=True)
    if "data.skip" in changes and index is not None:
        _refuse_late_skips(request.config, index)
    if index is not None and DATA in changes:
        request = _accepting(request, index.data_fingerprint)
    if step is not None:
        for later, path in rewind(run, step, mirror, lambda line: click.echo(line, err=True)):
            click.echo(f"step {later} no longer counts; it is kept as checkpoints/{path.name}", err=True)
    show_warnings(request)
    if changes:
        _record_changes(run, present, changes, index)
    put_submission(run, request, command_line())
    return submit_and_follow(run, request.config.total_steps, request.cluster, "resume", attend, claim)


def _request(run: RunDir, cluster: str | None, overrides: Sequence[str], size: ClusterSize) -> Request:
    """The run's config with `overrides`, checked for `cluster` (default: the last one) in another `size`."""
    before = read_json(run.config) or {}
    tables = with_settings(before, overrides)
    where = cluster if cluster is not None else read_cluster(run)
    return examine(tables, run.config.name, where, run.path, is_new=False, size=size)


def _changes(
    run: RunDir, present: RunConfig, request: Request, index: CheckpointIndex | None
) -> dict[str, Any]:
    """What differs from the run's `present` config and from its checkpoint: dotted name → [old, new].

    `present` was read by this version, so a field that is newer than the run has its default on both sides.
    """
    before, after = (
        config.model_dump(mode="json", exclude_none=True) for config in (present, request.config)
    )
    data = joint_fingerprint(request.manifests)
    configs = {config_fingerprint(present), *earlier_config_fingerprints(run.events)}
    return changed_fields(before, after) | fingerprint_changes(index, request.config, data, configs)


def _record_changes(
    run: RunDir, present: RunConfig, changes: Mapping[str, Any], index: CheckpointIndex | None
) -> None:
    """Record `changes` with the fingerprint of the config that the checkpoint was saved under."""
    # When that checkpoint is corrupt, an older one is used, which the present config saved.
    fingerprint = index.config_fingerprint if index is not None else config_fingerprint(present)
    record_event(run.events, Event.CONFIG_CHANGED, changes=changes, config_fingerprint=fingerprint)


def _store_without_training(
    run: RunDir,
    present: RunConfig,
    request: Request,
    changes: Mapping[str, Any],
    index: CheckpointIndex | None,
) -> None:
    """Store changes that concern no number of the run, such as a new place of the data."""
    if not changes:
        return
    if any(name in (DATA, CONFIG) or RULES[rule_of(name)] is not Change.FREE for name in changes):
        click.echo(f"not stored, because nothing is trained: {', '.join(changes)}", err=True)
        return
    _record_changes(run, present, changes, index)
    put_config(run, request)
    click.echo(f"stored: {', '.join(changes)}", err=True)


def _index(folder: Path | None) -> CheckpointIndex | None:
    """The index of the checkpoint in `folder`, unless it is missing or corrupt."""
    if folder is None:
        return None
    with suppress(Corrupt):  # the workers report it and use an older checkpoint
        return read_index(folder)
    return None


def _refuse_late_skips(config: RunConfig, index: CheckpointIndex) -> None:
    """Refuse ranges of data.skip that were already read before `index`, as the workers would."""
    places = config.batch_sizes.until(index.step)
    SkipList(index.skipped).extended(config.data.skip, index.step, places)


def _accepting(request: Request, fingerprint: str) -> Request:
    """`request` for a run whose checkpoints may come from the data of `fingerprint` too."""
    return replace(request, config=request.config.accepting_data(fingerprint))
