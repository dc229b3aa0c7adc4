"""Run directories: how they are created, what a submission writes into them, how they are found again.

A run directory holds everything that its workers need, including the code, and never its own path.
"""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.config_file import dotted, validate
from data_pipeline.errors import ConfigError, LaunchError
from gpt.config.run import RunConfig
from gpt.run.environment import Variable
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
    taken = [
        int(entry.name.removeprefix(f"{name}-"))
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name.startswith(f"{name}-") and entry.name.removeprefix(f"{name}-").isdigit()
    ]
    return folder / f"{name}-{max(taken, default=0) + 1:04d}"


def open_run(folder: str | Path) -> RunDir:
    """The run in `folder`. Raises LaunchError when there is none."""
    run = RunDir(absolute(folder))
    if not run.config.exists():
        raise LaunchError(
            f"{folder} is not a run directory: it has no config.json. `outlast status` lists runs."
        )
    return run


def list_runs() -> list[RunDir]:
    """All runs in the default folder, by name."""
    folder = runs_folder()
    if not folder.is_dir():
        return []
    return [run for entry in sorted(folder.iterdir()) if (run := RunDir(entry)).config.exists()]


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


def create_run(folder: Path, request: Request, command: list[str]) -> RunDir:
    """Create a run directory with config, cluster, provenance and code. Raises LaunchError if it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(exist_ok=folder.is_dir() and not any(folder.iterdir()))
    except FileExistsError:
        raise LaunchError(f"another command has just created {folder}; launch again.") from None
    run = RunDir(folder)
    run.attempts.mkdir()
    run.checkpoints.mkdir()
    put_submission(run, request, command)
    return run


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
