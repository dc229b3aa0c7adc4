"""Workers, nodes and controllers that die, in real trainings (ZeRO-2, two nodes) on a real Slurm."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from launcher.process_tree import descendants
from tests.slurm.cluster import SlurmCluster, wait_for
from tests.slurm.conftest import SlurmRun, node_task

NewRun = Callable[..., SlurmRun]


def test_killed_worker_is_restarted_inside_the_job(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run()
    run.launch()
    for rank, step in ((1, 60), (0, 110)):
        run.wait_for_step(step)
        run.kill_worker(rank)
        attempts = len(run.events("attempt_started"))
        run.wait(lambda before=attempts: len(run.events("attempt_started")) > before)
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference
    assert run.events("requeued") == []
    assert [line["turn"] for line in run.events("turn_started")] == [0]


def test_lost_node_costs_the_steps_since_the_last_checkpoint(
    new_slurm_run: NewRun, reference: list[float], cluster: SlurmCluster
) -> None:
    run = new_slurm_run()
    run.launch()
    run.wait_for_step(60)
    node, daemons = step_daemon(run, rank=1)
    cluster.kill_node(node)
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)
    run.wait_for_job_run(1)
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference
    assert node not in cluster.field(run.job_id, "NodeList") or node in cluster.nodes[:2]


def test_orphaned_workers_on_a_lost_node_detect_the_newer_attempt_and_exit(
    new_slurm_run: NewRun, reference: list[float], cluster: SlurmCluster
) -> None:
    run = new_slurm_run()
    run.launch(nodes=1)
    run.wait_for_step(60)
    node, daemons = step_daemon(run, rank=0)
    everything = [pid for daemon in daemons for pid in (*descendants(daemon), daemon)]
    for pid in everything:  # as if the network were gone for a while
        os.kill(pid, signal.SIGSTOP)
    cluster.kill_node(node)
    run.wait_for_job_run(1)
    run.wait(lambda: len(run.events("attempt_started")) == 2)
    run.wait_for_step(120)
    for pid in reversed(everything):
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everything[:-1]), 60)
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == run_alone(reference, run)


def test_run_survives_an_absent_controller(
    new_slurm_run: NewRun, reference: list[float], cluster: SlurmCluster
) -> None:
    run = new_slurm_run()
    run.launch()
    run.wait_for_step(30)
    cluster.stop_controller()
    attempt = len(run.events("attempt_started"))
    run.wait_for_step(60)
    # With proctrack/cgroup, too, Slurm signals only the task.
    os.kill(node_task(run, node=0), signal.SIGTERM)
    run.wait(lambda: bool(run.events("stopped")))
    subprocess.run(["sleep", "8"], check=True)  # the first questions get no answer
    assert len(run.events("attempt_started")) == attempt
    cluster.start_controller()
    run.wait_for_job_run(1)
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference


def test_crash_loop_ends_the_job_without_a_requeue(new_slurm_run: NewRun) -> None:
    run = new_slurm_run(launch__max_failures=3)
    run.launch()
    for attempt in (1, 2, 3):
        run.wait(lambda number=attempt: len(run.events("attempt_started")) >= number)
        run.kill_worker(1)
    outcome = run.wait_for_end()
    assert outcome["exit_code"] == 93
    assert "3 attempts in a row ended without a new checkpoint" in outcome["cause"]
    assert run.events("requeued") == []
    assert run.status()["state"] == "failed"


def test_stopped_rank_is_named_and_the_workers_restart(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run(launch__hang_timeout_s=12)
    run.launch()
    run.wait_for_step(60)
    run.kill_worker(1, signal.SIGSTOP)
    run.wait(lambda: bool(run.events("hang")))
    [hang] = run.events("hang")
    host = run.owner()["workers"][1]["host"]
    assert hang["culprit"] == f"rank 1 on {host} is stopped (state T in /proc)"
    [log] = run.dir.attempt(1).path.glob("node-*/rank-00000.log")
    assert "most recent call first" in log.read_text()
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference


def test_rank_missing_from_a_collective_is_named(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run(launch__hang_timeout_s=12)
    run.launch()
    run.wait(run.dir.submissions.exists)
    step = run.dir.code / "gpt" / "training" / "step.py"
    step.write_text(step.read_text() + SLEEPING_RANK.format(once=run.dir.path / "slept"))
    run.wait(lambda: bool(run.events("hang")))
    [hang] = run.events("hang")
    assert "rank 1 on " in hang["culprit"].partition(";")[0]
    assert "in sleeping_step" in hang["culprit"]
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference


# What a bug on one rank would do, once: it never comes to the collective in which the others wait.
SLEEPING_RANK = """
import os, time
from pathlib import Path
_real_step, _steps = train_step, []
def sleeping_step(*arguments):
    _steps.append(1)
    if len(_steps) == 30 and os.environ["RANK"] == "1" and not Path("{once}").exists():
        Path("{once}").touch()
        time.sleep(1000)
    return _real_step(*arguments)
train_step = sleeping_step
"""


def step_daemon(run: SlurmRun, rank: int) -> tuple[str, list[int]]:
    """The node of `rank`, and its slurmstepd processes for this job's step (not the batch script's)."""
    owner = run.owner()
    worker = owner["workers"][rank]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"slurmstepd: [") and worker["pid"] in descendants(int(entry.name)):
            found.append(int(entry.name))
    assert found
    return worker["host"], found


def run_alone(reference: list[float], run: SlurmRun) -> list[float]:
    """Every step is recorded once. On one node the losses differ from those on two in the last bits."""
    losses = run.losses()
    assert all(abs(mine - theirs) < 1e-3 for mine, theirs in zip(losses, reference, strict=True))
    return losses
