"""How jobs end and continue: the time limit, scancel, stop, resume on other nodes, GraceTime 0."""

import json
from collections.abc import Callable

from tests.slurm.cluster import SlurmCluster, wait_for
from tests.slurm.conftest import STEPS, SlurmRun

NewRun = Callable[..., SlurmRun]


def test_preemption_without_grace_time_loses_the_steps_since_the_last_checkpoint(
    new_slurm_run: NewRun, reference: list[float]
) -> None:
    run = new_slurm_run()
    run.launch(partition="harsh")
    run.wait_for_step(60)
    run.preempt()
    run.wait(lambda: bool(run.events("resumed")))
    assert run.events("resumed")[0]["step"] >= 50
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference


def test_job_longer_than_its_time_limit_takes_several_job_runs(
    new_slurm_run: NewRun, reference: list[float]
) -> None:
    # An evaluation at every step takes time and does not change the losses.
    run = new_slurm_run(checkpoint__every_steps=1000, evaluation__every_steps=1, evaluation__tokens=10**6)
    run.launch(time_limit="00:02:00", signal_delay_s=30)  # Slurm may signal a minute early
    assert run.wait_for_end(timeout_s=400)["exit_code"] == 0
    assert run.losses() == reference
    causes = [line["cause"] for line in run.events("requeued")]
    assert causes
    assert all("SIGUSR2" in cause for cause in causes)


def test_cancelled_job_is_not_requeued(new_slurm_run: NewRun, cluster: SlurmCluster) -> None:
    run = new_slurm_run()
    run.launch()
    run.wait_for_step(20)
    cluster.run("scancel", run.job_id)
    outcome = run.wait_for_end()
    assert outcome["exit_code"] == 75
    assert "cancelled in Slurm" in outcome["cause"]
    assert run.events("requeued") == []
    assert run.status()["state"] == "cancelled"


def test_run_resumes_on_one_node_and_on_three_after_stop(new_slurm_run: NewRun) -> None:
    run = new_slurm_run(batch__global_batch_tokens=12 * 32, batch__micro_batch=2)
    run.launch()
    run.wait_for_step(20)
    for nodes in (1, 3):
        done = run.outlast("stop", str(run.dir.path))
        assert done.returncode == 0, done.stderr
        outcome = run.outcome()
        assert outcome is not None
        assert outcome["exit_code"] == 75
        assert run.status()["state"] == "stopped"
        stopped = run.events("checkpoint_saved")[-1]["step"]
        again = run.outlast("resume", str(run.dir.path), "--cluster", str(run.cluster_file(nodes=nodes)))
        assert again.returncode == 0, again.stderr
        run.wait_for_step(stopped + 20)
        assert run.events("attempt_started")[-1]["world_size"] == nodes
        assert run.events("resumed")[-1]["step"] == stopped
    assert run.wait_for_end()["exit_code"] == 0
    assert len(run.losses()) == STEPS


def test_stop_removes_a_pending_job_from_the_queue(new_slurm_run: NewRun, cluster: SlurmCluster) -> None:
    intruder = cluster.occupy()
    run = new_slurm_run()
    run.launch()
    row = run.status()
    assert row["state"] == "pending"
    assert row["reason"] in ("Resources", "Priority")  # Resources until Slurm has looked for nodes
    done = run.outlast("stop", str(run.dir.path))
    last_line = done.stderr.splitlines()[-1]
    assert (done.returncode, last_line) == (0, "removed from the queue; it had not started")
    assert run.status()["state"] == "stopped"
    cluster.run("scancel", intruder)


def test_stop_removes_a_requeued_job_from_the_queue(new_slurm_run: NewRun, cluster: SlurmCluster) -> None:
    run = new_slurm_run()
    run.launch()
    run.wait_for_step(60)
    cluster.run("scontrol", "requeue", run.job_id, check=True)
    wait_for(lambda: run.events("requeued"))
    done = run.outlast("stop", str(run.dir.path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("removed from the queue; step ")
    assert run.status()["state"] == "stopped"
    assert cluster.field(run.job_id, "JobState") == "CANCELLED"


def test_stopping_one_pending_run_of_a_sweep_leaves_the_others_in_the_queue(
    new_slurm_run: NewRun, cluster: SlurmCluster
) -> None:
    intruder = cluster.occupy()
    draft = new_slurm_run()
    (draft.folder / "sweep.toml").write_text(
        f'run = "{draft.folder / "run.toml"}"\n[grid]\nseed = [1, 2, 3]\n'
    )
    sweep = draft.folder / "sweep"
    options = ["--cluster", str(draft.cluster_file(nodes=1)), "--out", str(sweep)]
    launched = draft.outlast("sweep", "sweep.toml", *options)
    assert launched.returncode == 0, launched.stderr
    done = draft.outlast("stop", str(sweep / "0002_seed=2"))
    last_line = done.stderr.splitlines()[-1]
    assert (done.returncode, last_line) == (0, "removed from the queue; it had not started")
    rows = json.loads(draft.outlast("status", str(sweep), "--json").stdout)
    assert [row["state"] for row in rows] == ["pending", "stopped", "pending"]
    cluster.run("scancel", intruder)
