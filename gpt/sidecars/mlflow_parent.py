"""Creates the MLflow run that is the parent of the runs of a sweep.

`python -m gpt.sidecars.mlflow_parent URI EXPERIMENT NAME`
The parent run only holds the name of the sweep, and is finished at once. The last line printed is its id.
"""

import os
import sys

from gpt.sidecars.mlflow_store import experiment_id, open_client, prepare_environment

if __name__ == "__main__":
    prepare_environment(os.environ)
    uri, experiment, name = sys.argv[1:]
    client = open_client(uri)
    run_id = client.create_run(experiment_id(client, experiment, uri), run_name=name).info.run_id
    client.set_terminated(run_id)
    print(run_id)
