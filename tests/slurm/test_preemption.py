"""Preemptions of real trainings (ZeRO-2, two nodes) on a real Slurm."""

from collections.abc import Callable

from tests.slurm.conftest import STEPS, SlurmRun

NewRun = Callable[..., SlurmRun]


def test_undisturbed_run_equals_the_reference(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run()
    run.launch()
    outcome = run.wait_for_end()
    assert (outcome["exit_code"], outcome["cause"]) == (0, f"all {STEPS} steps are done")
    assert run.losses() == reference
    assert run.status()["state"] == "finished"


def test_preemption_with_grace_time_loses_no_step(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run()
    run.launch()
    run.wait_for_step(60)
    for turn in (1, 2):
        run.preempt()
        assert len(run.events("requeued")) == turn
        saved = run.events("checkpoint_saved")[-1]["step"]
        run.wait_for_step(saved + 40)
        assert run.events("resumed")[-1]["step"] == saved
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference
    run.assert_nothing_is_left()


def test_run_survives_a_partition_that_preempts_by_cancelling(new_slurm_run: NewRun) -> None:
    run = new_slurm_run()
    run.launch(partition="cancel")
    run.wait_for_step(60)
    run.preempt()
    saved = run.events("checkpoint_saved")[-1]["step"]
    run.wait_for_step(saved + 1)
    assert run.events("resumed")[-1]["step"] == saved
    assert len(run.events("requeued")) == 1


# In the run's code, which the tasks import from: the interpreter itself takes its time, once.
SLOW_PYTHON = """
import os, time
from pathlib import Path

if os.environ.get("SLURM_STEP_ID") == "0" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    Path("{seen}").touch()
    time.sleep(60)
"""


def test_job_preempted_while_python_starts_is_requeued(new_slurm_run: NewRun) -> None:
    run = new_slurm_run(schedule__total_steps=20)
    run.launch(sbatch={"export": "NONE"})  # the job does not inherit the submitter's environment either
    seen = run.folder / "seen"
    (run.dir.code / "sitecustomize.py").write_text(SLOW_PYTHON.format(seen=seen))
    run.wait(seen.exists)
    run.preempt()
    assert run.wait_for_end()["exit_code"] == 0
    assert [line["turn"] for line in run.events("turn_started")] == [1]
    run.assert_nothing_is_left()
