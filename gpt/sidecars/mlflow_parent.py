"""Create the MLflow run that is the parent of a sweep's runs.

`python -m gpt.sidecars.mlflow_parent URI EXPERIMENT NAME`
It holds nothing but their common name, and is finished at once. Its id is the last line printed.
"""

import os
import sys

from gpt.sidecars.mlflow import experiment_id, fail_soon

if __name__ == "__main__":
    fail_soon(os.environ)
    from mlflow.tracking import MlflowClient

    uri, experiment, name = sys.argv[1:]
    client = MlflowClient(uri)
    run_id = client.create_run(experiment_id(client, experiment), run_name=name).info.run_id
    client.set_terminated(run_id)
    print(run_id)
