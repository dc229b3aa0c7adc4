"""Serves MLflow's UI for a database: `python -m gpt.sidecars.mlflow_ui URI PORT`.

The process becomes MLflow's own server, with one worker and without telemetry.
"""

import os
import sqlite3
import sys

from gpt.sidecars.mlflow_store import prepare_environment, relocate_artifacts, sqlite_file

if __name__ == "__main__":
    prepare_environment(os.environ)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # processes that only language models need
    uri, port = sys.argv[1:]
    if (database := sqlite_file(uri)) is not None:
        try:
            relocate_artifacts(database)
        except sqlite3.Error as error:  # as in a database that only others may write
            print(f"the paths of files in {database} were not checked: {error}", file=sys.stderr)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
    os.execv(sys.executable, [*command, "--uvicorn-opts", "--log-level warning"])
