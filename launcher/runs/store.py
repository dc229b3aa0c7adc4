"""Run directories: where they are made, what a submission puts into them, how they are found again.

A run directory holds everything that its workers need, the code included, and never its own path.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.config_file import Section, dotted, validate
from data_pipeline.errors import ConfigError, LaunchError
from gpt.config.run import RunConfig
from gpt.run.environment import Variable
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.paths import absolute
from launcher.request import Request
from launcher.runs.job_record import is_copy

_PACKAGES = ("launcher", "gpt", "data_pipeline")
_RECORDED = ("outlast", "torch", "deepspeed", "numpy", "mlflow", "submitit", "tiktoken")


def runs_folder() -> Path:
    """Where runs are made by default: $OUTLAST_RUNS, else `runs` under the caller's directory."""
    return absolute(os.environ.get(Variable.RUNS, "runs"))


def next_run_folder(name: str, folder: Path | None = None) -> Path:
    """The first free `NAME-NNNN` in `folder` (default: among the runs); nothing is made."""
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
    return [RunDir(entry) for entry in sorted(folder.iterdir()) if RunDir(entry).config.exists()]


class SweepPoint(Section):
    """One run of a sweep: its folder's name, and the fields that it varies."""

    folder: str
    fields: dict[str, Any]


class SweepIndex(Section):
    """SWEEP_DIR/sweep.json: the runs of a sweep, in the order of its grid."""

    at_once: int | None = None
    points: tuple[SweepPoint, ...]


def read_sweep(folder: Path) -> SweepIndex | None:
    """What the sweep in `folder` consists of; None when it is no sweep. Raises ConfigError."""
    path = RunDir(folder).sweep
    content = read_json(path)
    return None if content is None else validate(SweepIndex, content, str(path))


def sweep_runs(folder: Path) -> list[RunDir] | None:
    """The runs of the sweep in `folder`, in the order of its grid; None when it is no sweep."""
    index = read_sweep(folder)
    return None if index is None else [RunDir(folder / point.folder) for point in index.points]


def read_config(run: RunDir) -> RunConfig:
    """The resolved config of a run. Raises ConfigError."""
    return validate(RunConfig, _content(run.config), run.config.name)


def read_cluster(run: RunDir) -> ClusterConfig:
    """The cluster that the run was submitted to last. Raises ConfigError."""
    return validate(ClusterConfig, _content(run.cluster), run.cluster.name)


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if content is None:
        raise ConfigError(f"{path} is missing")
    return content


def create_run(folder: Path, request: Request, command: list[str]) -> RunDir:
    """A new run directory with config, cluster, provenance and code. Raises LaunchError when it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(exist_ok=folder.is_dir() and not any(folder.iterdir()))
    except FileExistsError:
        raise LaunchError(f"{folder} was made by someone else just now; launch again.") from None
    run = RunDir(folder)
    run.attempts.mkdir()
    run.checkpoints.mkdir()
    put_submission(run, request, command)
    return run


def put_submission(run: RunDir, request: Request, command: list[str]) -> None:
    """Write what a submission decides: cluster, provenance, code, and last the config."""
    snapshot_code(run)
    write_json(run.cluster, explicit(request.cluster))
    before = read_json(run.provenance) or {}
    # A copy is a run of its own, with a mirror of its own.
    inherited = None if is_copy(run) else before.get("run_id")
    run_id = inherited or uuid.uuid4().hex
    write_json(run.provenance, {**before, "run_id": run_id, **provenance(request, command)})
    write_json(run.config, request.config.model_dump(mode="json", exclude_none=True))


def explicit(cluster: ClusterConfig) -> dict[str, Any]:
    """The fields that a cluster file set; what it leaves out must stay unasked of Slurm."""
    return cluster.model_dump(mode="json", exclude_unset=True)


def snapshot_code(run: RunDir) -> None:
    """Copy our packages, so that a queued or restarted job runs the code that was submitted."""
    source = Path(__file__).resolve().parents[2]
    temporary = run.path / f".code.{os.getpid()}"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.gz")  # the packaged corpus is not code
    for package in _PACKAGES:
        shutil.copytree(source / package, temporary / package, ignore=ignore)
    if run.code.exists():
        shutil.rmtree(run.code)
    temporary.rename(run.code)


def provenance(request: Request, command: list[str]) -> dict[str, Any]:
    """Where the run comes from: command line, versions, commit, host, data."""
    return {
        "command": command,
        "submitted_at": time.time(),
        "host": socket.gethostname(),
        "user": os.environ.get("USER", str(os.getuid())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "data_fingerprints": [manifest.fingerprint for manifest in request.manifests],
        "data_paths": [str(source.path) for source in request.config.data.sources],
    }


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name → [old, new] of every field in which two configs differ."""
    old, new = (dict(dotted(tables, into_lists=True)) for tables in (before, after))
    return {
        name: [old.get(name), new.get(name)]
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def job_environment(run: RunDir) -> dict[str, str]:
    """The caller's environment with the run's own code in front of whatever is installed."""
    environment = {**os.environ, **run.code_environment}
    if "CUDA_VISIBLE_DEVICES" in environment:  # submitit overwrites it in local jobs
        environment[Variable.CUDA_VISIBLE_DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    return environment


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """Commit of the checkout that our code stands in, with `+changes` when it is not clean."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changes = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with this interpreter, unbuffered so that logs are live."""
    return [sys.executable, "-u", "-m", module, *arguments]
