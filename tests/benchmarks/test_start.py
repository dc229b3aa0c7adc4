"""The time from the batch script of a requeued Slurm job to its first step, next to a bare DeepSpeed script.

The same Slurm starts both, with two processes on one node and the same network. The bare script checks,
restores and records nothing. `pytest -m benchmark tests/benchmarks/test_start.py -s`
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from tests.slurm.cluster import SlurmCluster, missing, wait_for
from tests.slurm.conftest import ROOT, SlurmRun, cluster, data_dir, new_slurm_run  # noqa: F401

ROUNDS = 5
BARE = """#!/bin/bash
date +%s.%N > {folder}/began
export PYTHONPATH={root} OMP_NUM_THREADS=1
exec srun {python} -m torch.distributed.run --nproc-per-node=2 {root}/tests/benchmarks/bare_deepspeed.py \\
    {config} {folder}/stepped
"""


@pytest.mark.benchmark
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_outlast_adds_less_than_two_seconds_to_a_restart(
    new_slurm_run: Callable[..., SlurmRun],  # noqa: F811
    cluster: SlurmCluster,  # noqa: F811
) -> None:
    run = new_slurm_run(schedule__total_steps=100_000, model__n_layers=8, model__d_model=128)
    began = run.folder / "began"
    fields = {"nodes": 1, "processes_per_node": 2, "setup": [f"date +%s.%N >> {began}"]}
    run.launch(**fields)
    run.wait_for_step(5)
    ours: list[float] = []
    bare: list[float] = []
    for job_run in range(1, ROUNDS + 1):
        cluster.run("scontrol", "requeue", run.job_id)
        wait_for(lambda: "BeginTime" in cluster.field(run.job_id, "Reason"))
        bare.append(bare_start_s(run.folder / f"bare-{job_run}", run.dir.config, cluster))
        run.wait_for_job_run(job_run)
        run.wait(lambda count=job_run: len(first_steps(run)) > count)
        began_at = float(began.read_text().split()[-1])
        ours.append(first_steps(run)[-1] - began_at)
        phases = [event for event in run.events("phase") if event["time"] > began_at]
    print(f"\nto the first step: ours {median(ours):.2f} s, bare {median(bare):.2f} s, of {ROUNDS} rounds")
    print("the phases of our workers: " + ", ".join(f"{e['name']} {e['seconds']:.2f} s" for e in phases))
    assert median(ours) - median(bare) < 2.0


def first_steps(run: SlurmRun) -> list[float]:
    """The time at which each job run completed its first step, in Unix seconds."""
    return [event["time"] for event in run.events("phase") if event["name"] == "first_step"]


def bare_start_s(folder: Path, config: Path, cluster: SlurmCluster) -> float:  # noqa: F811
    """Seconds from the bare job's batch script to the end of its first step."""
    folder.mkdir()
    script = folder / "bare.sh"
    script.write_text(BARE.format(folder=folder, root=ROOT, python=sys.executable, config=config))
    done = cluster.run("sbatch", "--parsable", f"--output={folder}/log", str(script), check=True)
    job = done.stdout.strip()
    wait_for(lambda: (folder / "stepped").exists() or cluster.field(job, "JobState") == "FAILED", 120)
    assert (folder / "stepped").exists(), (folder / "log").read_text()
    time.sleep(0.2)
    cluster.run("scancel", job)
    return float((folder / "stepped").read_text()) - float((folder / "began").read_text())
