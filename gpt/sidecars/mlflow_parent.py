"""Creates the MLflow run that is the parent of the runs of a sweep.

`python -m gpt.sidecars.mlflow_parent URI EXPERIMENT NAME`
The parent run only holds the name of the sweep, and is finished at once. The last line printed is its id.
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
