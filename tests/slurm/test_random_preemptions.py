"""A run that is preempted, killed and requeued at random has the losses of an undisturbed one."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import SlurmRun, node_task

INTERRUPTIONS = int(os.environ.get("OUTLAST_KILLS", "12"))


@pytest.mark.chaos
def test_random_preemptions_and_kills_leave_the_losses_unchanged(
    new_slurm_run: Callable[..., SlurmRun], cluster: SlurmCluster, reference: list[float]
) -> None:
    # Evaluations make the steps slow, so that the run lasts until the last fault, and change no loss.
    run = new_slurm_run(evaluation__every_steps=2, evaluation__tokens=200_000, launch__max_failures=1000)
    run.launch()
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(INTERRUPTIONS):
        turn = int(cluster.field(run.job_id, "Restarts"))
        run.wait_for_job_run(turn)
        time.sleep(chance.uniform(0.0, 12.0))  # also while it starts
        if run.outcome() is not None:
            break
        match chance.choice(["preempt", "requeue", "signal", "worker"]):
            case "preempt":
                run.preempt()
            case "requeue":
                cluster.run("scontrol", "requeue", run.job_id)
                run.wait_for_job_run(turn + 1)
            case "signal":
                os.kill(node_task(run, node=0), signal.SIGTERM)
                run.wait_for_job_run(turn + 1)
            case "worker":
                with suppress(ProcessLookupError, LookupError):  # the job may have ended already
                    run.kill_worker(chance.choice([0, 1]))
    assert run.wait_for_end(600)["exit_code"] == 0
    assert run.losses() == reference
