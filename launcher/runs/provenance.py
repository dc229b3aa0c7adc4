"""provenance.json: where a run comes from. Recorded for people and tools; nothing in a run depends on it."""

import os
import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.request import Request

_RECORDED = ("outlast", "torch", "deepspeed", "numpy", "mlflow", "submitit", "tiktoken")


def provenance(request: Request, command: list[str]) -> dict[str, Any]:
    """The command line, versions, git commit, host and data of a submission."""
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


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the checkout that this code is in, with `+changes` when the checkout is not clean."""
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
