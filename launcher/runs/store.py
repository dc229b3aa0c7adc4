"""Run directories: how they are created, what a submission writes into them, how they are found again.

A run directory holds everything that its workers need, including the code, and never its own path.
"""

import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.config_file import dotted, validate
from data_pipeline.errors import ConfigError, LaunchError
from gpt.checkpoint.format import committed
from gpt.config.run import RunConfig
from gpt.run.environment import Variable
from gpt.run.events import Event, read_events, record_event
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from gpt.run.tokenizer import copy_encoding
from launcher.cluster import ClusterConfig
from launcher.paths import absolute
from launcher.request import Request
from launcher.runs.code_snapshot import snapshot_code
from launcher.runs.job_record import is_copy
from launcher.runs.provenance import provenance


def runs_folder() -> Path:
    """Where runs are created by default: $OUTLAST_RUNS, else `runs` in the caller's directory."""
    return absolute(os.environ.get(Variable.RUNS, "runs"), Variable.RUNS)


def next_run_folder(name: str, folder: Path | None = None) -> Path:
    """The first free `NAME-NNNN` in `folder`, by default in `runs_folder()`. Creates nothing."""
    folder = folder or runs_folder()
    number = re.compile(re.escape(name) + "-([0-9]+)")
    names = (entry.name for entry in (folder.iterdir() if folder.is_dir() else ()))
    taken = [int(match[1]) for each in names if (match := number.fullmatch(each))]
    return folder / f"{name}-{max(taken, default=0) + 1:04d}"


def make_next_run_folder(name: str, folder: Path | None = None) -> Path:
    """Create the folder that `next_run_folder` names; two commands at the same moment get two folders."""
    while True:
        path = next_run_folder(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir()
            return path


def open_run(folder: str | Path) -> RunDir:
    """The run in `folder`. Raises LaunchError when there is none."""
    run = RunDir(absolute(folder))
    if not run.config.exists():
        raise LaunchError(
            f"{folder} is not a run directory: it has no config.json. `outlast status` lists runs."
        )
    return run


def list_runs() -> list[RunDir]:
    """All runs in the default folder, by name; a sweep counts as one, and so does a private folder."""
    folder = runs_folder()
    if not folder.is_dir():
        return []
    return [run for entry in sorted(folder.iterdir()) if _may_be_run(run := RunDir(entry))]


def _may_be_run(run: RunDir) -> bool:
    try:
        return run.config.exists() or run.sweep.exists()
    except PermissionError:  # it belongs to somebody else
        return True


def read_config(run: RunDir) -> RunConfig:
    """The resolved config of a run. Raises ConfigError."""
    return validate(RunConfig, _content(run.config), run.config.name)


def read_cluster(run: RunDir) -> ClusterConfig:
    """The cluster of the run's newest submission. Raises ConfigError."""
    if not run.cluster.exists():
        raise ConfigError(f"{run.cluster} is missing. Give the cluster with --cluster.")
    return validate(ClusterConfig, _content(run.cluster), run.cluster.name)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if content is None:
        raise ConfigError(f"{path} is missing")
    return content


def create_run(
    folder: Path, request: Request, command: list[str], begins_with: Mapping[Event, Mapping[str, Any]] = {}
) -> RunDir:
    """Create a run directory with config, cluster, provenance and code. Raises LaunchError if it exists.

    `begins_with` is the event of a run that starts from given weights. It is recorded before the config, so
    that a command that is interrupted before the weights are there leaves no run that starts from new ones.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(exist_ok=folder.is_dir() and not any(folder.iterdir()))
    except FileExistsError:
        raise LaunchError(f"another command has just created {folder}; launch again.") from None
    run = RunDir(folder)
    run.attempts.mkdir()
    run.checkpoints.mkdir()
    for event, fields in begins_with.items():
        record_event(run.events, event, **fields)
    put_submission(run, request, command)
    return run


def refuse_unseeded(run: RunDir) -> None:
    """Raise LaunchError if the command that was to give `run` its first checkpoint did not get that far."""
    begun = list(read_events(run.events, Event.FORKED, Event.IMPORTED, Event.CHECKPOINT_SAVED))
    if not begun or any(event["event"] == Event.CHECKPOINT_SAVED for event in begun):
        return
    if committed(run.checkpoints):
        return
    source = begun[0].get("source") or f"step {begun[0].get('step')} of {begun[0].get('run')}"
    raise LaunchError(
        f"{run.path} was to start from {source}, and that checkpoint is not there: the command that made the "
        "run was interrupted, or the checkpoint was removed. It does not start from new weights instead. "
        "Remove the directory, then repeat that command."
    )


def put_submission(run: RunDir, request: Request, command: list[str]) -> None:
    """Write what a submission decides: code, tokenizer, cluster, provenance, and last the config."""
    snapshot_code(run)
    write_json(run.cluster, request.cluster.explicit())
    before = read_json(run.provenance) or {}
    # A copy of a run directory is a run of its own, with a mirror of its own.
    inherited = None if is_copy(run) else before.get("run_id")
    run_id = inherited or uuid.uuid4().hex
    write_json(run.provenance, {**before, "run_id": run_id, **provenance(request, command)})
    put_config(run, request)


def put_config(run: RunDir, request: Request) -> None:
    """Write the config, after a copy of the tokenizer of its data."""
    copy_encoding(run, request.config.data.sources[0].path)
    write_json(run.config, request.config.model_dump(mode="json", exclude_none=True))


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name → [old, new] of every field that differs between two configs."""
    old, new = (dict(dotted(tables, into_lists=True)) for tables in (before, after))
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }
