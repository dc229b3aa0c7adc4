"""RUN/code: a copy of our packages, so that a queued or restarted job runs the code that was submitted."""

import os
import shutil
import sys
from pathlib import Path

from gpt.run.environment import Variable
from gpt.run.run_dir import RunDir

_PACKAGES = ("launcher", "gpt", "data_pipeline")


def snapshot_code(run: RunDir) -> None:
    """Copy our packages into the run directory, in place of an earlier copy."""
    source = Path(__file__).resolve().parents[2]
    # What a command that was killed here has left. Only one command at a time starts a run.
    for leftover in run.path.glob(f"{run.code_being_copied.stem}.*"):
        shutil.rmtree(leftover)
    temporary = run.code_being_copied
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.gz")  # the packaged corpus is not code
    for package in _PACKAGES:
        shutil.copytree(source / package, temporary / package, ignore=ignore)
    if run.code.exists():
        shutil.rmtree(run.code)
    temporary.rename(run.code)


def job_environment(run: RunDir) -> dict[str, str]:
    """The caller's environment, in which Python imports the run's own code before any installed one."""
    environment = {**os.environ, **run.code_environment}
    if "CUDA_VISIBLE_DEVICES" in environment:  # submitit overwrites it in local jobs
        environment[Variable.CUDA_VISIBLE_DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    return environment


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with this interpreter, unbuffered so that logs are live."""
    return [sys.executable, "-u", "-m", module, *arguments]
