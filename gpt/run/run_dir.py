"""Every path in a run directory: the one place where their names stand.

A run directory never stores its own path, so that it can be moved or copied.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError

T = TypeVar("T")

PATIENCE_S = 300.0
RETRY_S = 5.0


@dataclass(frozen=True)
class RunDir:
    """The layout of one run on disk."""

    path: Path

    @property
    def config(self) -> Path:
        """The fully resolved run config: the one file that workers trust."""
        return self.path / "config.json"

    @property
    def cluster(self) -> Path:
        """The cluster config, so that a bare resume knows where."""
        return self.path / "cluster.json"

    @property
    def provenance(self) -> Path:
        """Command line, versions, git commit, host, data fingerprint, MLflow run id."""
        return self.path / "provenance.json"

    @property
    def code(self) -> Path:
        """The packages as they were at submission; workers import from here."""
        return self.path / "code"

    @property
    def code_environment(self) -> dict[str, str]:
        """The variables by which a Python imports `code`."""
        # Without the second one `-m` would find a checkout in the current folder first.
        return {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}

    @property
    def submission(self) -> Path:
        """submitit's own folder: pickles and the logs of its tasks."""
        return self.path / "submission"

    @property
    def job(self) -> Path:
        """The newest submission: executor, job id, host, process id, time."""
        return self.path / "job.json"

    @property
    def attempts(self) -> Path:
        """One numbered folder for each generation of workers."""
        return self.path / "attempts"

    @property
    def profiles(self) -> Path:
        """Traces of torch's profiler, where the config asked for them."""
        return self.path / "profile"

    @property
    def stop(self) -> Path:
        """A stop request, while it stands."""
        return self.path / "stop"

    @property
    def metrics(self) -> Path:
        """The record: one line a step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, phases, stops, saves, failures."""
        return self.path / "events.jsonl"

    @property
    def bad_nodes(self) -> Path:
        """Nodes that failed their check or their run, one line each."""
        return self.path / "bad_nodes.jsonl"

    @property
    def tracking(self) -> Path:
        """How far the mirror in MLflow has come."""
        return self.path / "tracking.json"

    @property
    def mlflow_database(self) -> Path:
        """Where MLflow keeps its runs by default: one SQLite file for all the runs of a folder."""
        return self.path.resolve().parent / "mlflow.db"

    @property
    def checkpoints(self) -> Path:
        """`step-NNNNNNNN` folders; names with a leading dot are not committed."""
        return self.path / "checkpoints"

    def attempt(self, number: int) -> Path:
        """The folder of attempt `number`."""
        return self.attempts / f"{number:04d}"

    def attempt_numbers(self) -> list[int]:
        """The attempts so far, oldest first."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.attempts.iterdir() if entry.name.isdigit())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a reader finds the old file or the new one, never a part."""
    write_durably(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None where there is none. Raises ConfigError when it is garbled."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not an object")
    return content


def is_listed(path: Path) -> bool:
    """Whether `path` is there, for those who ask again and again for what another machine may make: NFS
    caches for a while that a name is missing, but reads a folder anew whenever it is opened.
    """
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208 - names alone are wanted
    except FileNotFoundError:
        return False


def patiently(action: Callable[[], T]) -> T:
    """`action()`, tried again for PATIENCE_S while the disk does not take it: a restart would not help."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            with suppress(OSError):
                print(f"the run directory does not answer, trying again: {error}", flush=True)
            time.sleep(RETRY_S)


def is_exported(folder: Path) -> bool:
    """Whether `folder` is an export, or another that transformers loads, rather than a run directory."""
    return "model_type" in (read_json(folder / "config.json") or {})
