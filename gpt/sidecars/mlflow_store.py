"""Opens the place where MLflow keeps runs: a server, or an SQLite file that is created when it is missing.

An SQLite file is created under a temporary name and then linked to its own, because MLflow's migrations break
a database for good when two processes run them at once. The files of runs (artifacts) are kept beside the
SQLite file. MLflow stores their absolute path, so it is corrected when the folder has moved.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import MutableMapping
from contextlib import closing, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any
from uuid import uuid4

from gpt.run.run_dir import mlflow_artifacts_beside

_SQLITE = "sqlite:///"
_LEFTOVER_S = 3600.0  # a file that is still being created is younger than this
# With this kind the UI shows training runs first, not the pages for language model applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Make MLflow give up quickly (its own retries take four minutes a call) and send no telemetry."""
    environment.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    environment.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def open_client(uri: str) -> Any:
    """MLflow's client for `uri`; an SQLite file is created when it is missing."""
    from mlflow.tracking import MlflowClient

    if (database := sqlite_file(uri)) is not None:
        create_database(database)
        relocate_artifacts(database)
    return MlflowClient(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI; None for another URI."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def create_database(path: Path) -> None:
    """Create MLflow's tables in an SQLite file at `path`, unless it exists. Safe in several processes."""
    if path.exists() and path.stat().st_size > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.new-*"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - left.stat().st_mtime > _LEFTOVER_S:
                left.unlink()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    made = path.with_name(f".{path.name}.new-{uuid4().hex[:12]}")
    try:
        create: Any = SqlAlchemyStore
        create(f"{_SQLITE}{made}", str(mlflow_artifacts_beside(path))).engine.dispose()
        _publish(made, path)
    finally:
        made.unlink(missing_ok=True)


def _publish(made: Path, path: Path) -> None:
    """Give `made` the name `path`, unless another process was faster."""
    with suppress(FileNotFoundError), path.open("rb") as there:
        mine = os.fstat(there.fileno())
        if mine.st_size == 0:
            # A process that was killed has left it: one of those that wait for its lock replaces it.
            fcntl.flock(there, fcntl.LOCK_EX)
            now = path.stat()
            if now.st_ino == mine.st_ino and now.st_size == 0:
                made.rename(path)
        return
    try:
        os.link(made, path)  # unlike a rename, it never replaces a file
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            made.rename(path)


def relocate_artifacts(path: Path) -> None:
    """Correct the paths of artifacts in the SQLite file at `path` if its folder has moved since."""
    folder = mlflow_artifacts_beside(path)
    pattern = f"%/{folder.name}%"
    with closing(sqlite3.connect(path, timeout=20.0)) as database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            found = database.execute(
                f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE ? AND {column} NOT LIKE ?",
                (pattern, f"{folder}%"),
            ).fetchall()
            for (old,) in found:
                start, name, rest = str(old).rpartition(f"/{folder.name}")
                if "://" not in start and rest[:1] in ("", "/"):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? WHERE {column} = ?",
                        (f"{folder.parent}{name}{rest}", old),
                    )
        database.commit()


class Found(Enum):
    """What became of a run in MLflow."""

    THERE = auto()
    RESTORED = auto()
    MISSING = auto()


def find_run(client: Any, run_id: str) -> Found:
    """Look for a run, and restore it if someone has deleted it or its experiment."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return Found.MISSING
    experiment = client.get_experiment(found.info.experiment_id)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)  # with its runs
    elif found.info.lifecycle_stage != "deleted":
        return Found.THERE
    if client.get_run(run_id).info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    return Found.RESTORED


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of MLflow's experiment `name`: created if it is missing, restored if it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(uri)
        location = str(mlflow_artifacts_beside(database)) if database is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS))
        except MlflowException:  # another run has created it at this moment
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    for key, value in _EXPERIMENT_TAGS.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)
