"""Who can decide what a run executes: its directory holds shell lines, code and submitit's pickles.

Whoever can write there can run commands as the user who resumes the run.
"""

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import ConfigError
from gpt.run.run_dir import RunDir

TRUST_OPTION = "--trust"
# Fields of a cluster file that name commands, libraries or programs for the nodes.
_EXECUTED = ("setup", "environment", "container", "sbatch")


def foreign_writers(run: RunDir) -> str | None:
    """Why others may have changed what a run executes, in one sentence; None when only its user can write."""
    user = os.getuid()
    for path in (run.path, run.config, run.cluster, run.submissions):
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_mode & stat.S_IWOTH:
            return f"everybody can write to {path}"
        # In a container the user is often root, and the folder belongs to somebody outside.
        if user not in (0, status.st_uid) and status.st_uid != 0:
            return f"{path} belongs to another user (id {status.st_uid})"
    return None


def require_own(run: RunDir, *, is_trusted: bool) -> None:
    """Raises ConfigError when others can write to a run or a sweep, unless the user trusts them."""
    if not is_trusted and (reason := foreign_writers(run)) is not None:
        raise ConfigError(
            f"{reason}, and what lies there is executed. Look at it (at {run.cluster.name} above all), then "
            f"take that permission away, copy the folder, or accept it with {TRUST_OPTION}."
        )


def executed_fields(cluster: Mapping[str, Any]) -> str:
    """The fields of a cluster.json that decide what its nodes execute, as text; empty when there are none."""
    found = {name: cluster[name] for name in _EXECUTED if cluster.get(name)}
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=True)}" for name, value in found.items())
