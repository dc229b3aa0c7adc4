"""Submitting from inside a Slurm job: the new job must not inherit the old one's environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Remove from the environment the job in which this command runs, if any; sbatch would inherit it.

    The location of Slurm's configuration stays, and so do the SBATCH_ variables that a user has set on a
    login node.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit import helpers

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with helpers.clean_env():
        os.environ.update(kept)
        yield
