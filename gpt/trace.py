"""`python -m gpt.trace`: dry steps of runs, for `outlast plan --trace`. Needs no GPU, network or data.

Standard input has one JSON object a line: {"run": RunConfig, "world_size", "local_size", "capability":
[major, minor]}. For each of them standard output gets one line, a gpt.run.dry_step.DryStep.
"""

import contextlib
import json
import sys
import warnings

from data_pipeline.errors import OutlastError
from gpt.config.run import RunConfig
from gpt.dry_run.whole_run import dry_step_of
from gpt.run.exit_codes import exit_code_of


def main() -> None:
    """Answer every request."""
    warnings.simplefilter("ignore")  # of DeepSpeed and torch, about names that they are going to change
    for line in sys.stdin:
        request = json.loads(line)
        run = RunConfig.model_validate(request["run"])
        sizes = request["world_size"], request["local_size"], tuple(request["capability"])
        with contextlib.redirect_stdout(sys.stderr):
            step = dry_step_of(run, *sizes)
        print(json.dumps(step.as_json()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
