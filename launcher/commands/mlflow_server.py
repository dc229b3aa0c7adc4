"""Serves MLflow's UI on this machine until Ctrl-C, and prints its address once it answers."""

import json
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from typing import Any

import click

from data_pipeline.errors import LaunchError
from gpt.run.process_control import dies_with_parent
from launcher.runs.code_snapshot import python_module

_POLL_S = 0.3
_ANSWER_S = 10.0
_STANDARD_ERROR = 2


def serve(uri: str, port: int, run_id: str | None) -> int:
    """Serve the runs in the database at `uri`; the exit code. Raises LaunchError when the port is taken.

    The address that is printed shows the run `run_id`, or else the experiment that changed last.
    """
    _refuse_taken(port)
    click.echo(f"MLflow's server starts and reads {uri}; this can take a minute", err=True)
    process = subprocess.Popen(
        python_module("gpt.sidecars.mlflow_ui", uri, str(port)),
        stdout=_STANDARD_ERROR,  # standard output has the address only
        preexec_fn=dies_with_parent(signal.SIGTERM),
    )
    try:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            if _answer(f"{address}/health") is not None:
                click.echo(f"{address}/{_page(address, run_id)}")
                click.echo("press Ctrl-C to stop the server", err=True)
                break
            time.sleep(_POLL_S)
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LaunchError(
                f"port {port} cannot be used ({error.strerror}); another process, perhaps an earlier "
                f"`outlast ui`, has it. Choose another one, for example --port {port + 1}."
            ) from None


def _page(address: str, run_id: str | None) -> str:
    """The part of the address that opens the table of runs, or one run, instead of MLflow's welcome."""
    api = f"{address}/api/2.0/mlflow"
    if run_id is not None:
        run = (_answer(f"{api}/runs/get?run_id={run_id}") or {}).get("run", {})
        if (experiment := run.get("info", {}).get("experiment_id")) is not None:
            return f"#/experiments/{experiment}/runs/{run_id}"
    order = b'{"max_results": 20, "order_by": ["last_update_time DESC"]}'
    experiments = (_answer(f"{api}/experiments/search", order) or {}).get("experiments", [])
    ours = [each["experiment_id"] for each in experiments if each.get("name") != "Default"]
    return f"#/experiments/{ours[0]}/runs" if ours else "#/experiments"


def _answer(address: str, body: bytes | None = None) -> dict[str, Any] | None:
    """The JSON object that the server answers, {} when it is none, and None without an answer."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            content = answer.read()
    except (OSError, ValueError):
        return None
    with suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else {}
    return {}
