"""`outlast plan --trace`: runs the dry step in a child process, because it needs torch."""

import json
import os
import subprocess

import click

from data_pipeline.errors import LaunchError
from gpt.run.dry_step import DryStep
from gpt.run.exit_codes import ExitCode
from launcher.preflight.trace import request_of
from launcher.request import Request
from launcher.runs.code_snapshot import python_module

_TIMEOUT_S = 1800.0  # a dry step takes a minute or two on two cores; thousands of ranks take longer


def dry_step(request: Request) -> DryStep:
    """The dry step of a checked request. Raises LaunchError with what the child said if it failed."""
    asked = json.dumps(request_of(request.config, request.cluster)) + "\n"
    click.echo("running one step without GPUs, which takes a minute or two", err=True)
    try:
        done = subprocess.run(
            python_module("gpt.trace"),
            input=asked,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"the dry step has not ended after {_TIMEOUT_S:.0f} s. Trace a cluster with fewer nodes."
        ) from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == ExitCode.BAD_INPUT:
            raise LaunchError(said[-1].removeprefix("error: "))
        raise LaunchError("the dry step failed:\n" + "\n".join(said[-15:]))
    return DryStep.from_json(json.loads(done.stdout.splitlines()[-1]))
