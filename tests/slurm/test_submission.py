"""Checks before a submission, arrays and containers, on a real Slurm."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.run import record
from gpt.run.run_dir import RunDir
from launcher.runs.sweep_index import sweep_runs
from tests.slurm.cluster import SlurmCluster, wait_for
from tests.slurm.conftest import SlurmRun, node_task

NewRun = Callable[..., SlurmRun]


def test_dry_run_shows_the_batch_script_that_sbatch_gets(new_slurm_run: NewRun) -> None:
    run = new_slurm_run(schedule__total_steps=5)
    cluster = run.cluster_file(cpus_per_process=1, sbatch={"comment": "mine"})
    options = ["--cluster", str(cluster), "--run-dir", str(run.dir.path)]
    shown = run.outlast("launch", str(run.folder / "run.toml"), *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "other machines usually cannot see" in shown.stderr  # the run is on a local disk
    assert not run.dir.path.exists()
    launched = run.outlast("launch", str(run.folder / "run.toml"), *options)
    assert launched.returncode == 0, launched.stderr
    [submitted] = run.dir.submissions.glob("0001/*_submission.sh")
    assert submitted.read_text().rstrip() in shown.stdout
    assert "#SBATCH --comment=mine\n" in submitted.read_text()
    assert run.wait_for_end()["exit_code"] == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partition": "nowhere"}, "Slurm would refuse the job: invalid partition specified: nowhere"),
        ({"nodes": 8}, "Slurm would refuse the job: "),
        ({"gpus_per_node": 1}, "Requested node configuration is not available"),
        ({"partition": "short", "time_limit": "10:00:00"}, "is more than partition short allows (01:00:00)"),
    ],
)
def test_job_that_slurm_would_refuse_is_refused_before_anything_is_written(
    new_slurm_run: NewRun, fields: dict[str, object], words: str
) -> None:
    run = new_slurm_run(batch__micro_batch=1)
    cluster = run.cluster_file(**fields)
    options = ["--cluster", str(cluster), "--run-dir", str(run.dir.path)]
    refused = run.outlast("launch", str(run.folder / "run.toml"), *options)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert not run.dir.path.exists()


@pytest.mark.parametrize(
    ("partition", "told"),
    [
        ("low,cancel", []),
        ("harsh", ["partition harsh preempts without a grace time"]),
        ("gone", ["partition gone preempts by ending jobs for good, without a grace time"]),
        (
            "low,short",
            [
                "time_limit = 02:00:00 is more than partition short allows (01:00:00): the job never starts",
                "partition short preempts without a grace time",
            ],
        ),
    ],
)
def test_preemption_of_a_partition_is_reported_before_the_launch(
    new_slurm_run: NewRun, partition: str, told: list[str]
) -> None:
    run = new_slurm_run()
    cluster = run.cluster_file(partition=partition, time_limit="02:00:00")
    options = ["--cluster", str(cluster), "--run-dir", str(run.dir.path)]
    shown = run.outlast("launch", str(run.folder / "run.toml"), *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    warnings = [line for line in shown.stderr.splitlines() if line.startswith("warning: ")]
    # All nodes are this machine.
    warnings = [line for line in warnings if "other machines usually cannot see" not in line]
    assert len(warnings) == len(told)
    assert all(line.startswith(f"warning: {words}") for line, words in zip(warnings, told, strict=True))


def test_sweep_is_one_array_and_its_jobs_are_requeued_separately(
    new_slurm_run: NewRun, cluster: SlurmCluster
) -> None:
    draft = new_slurm_run(schedule__total_steps=400)
    (draft.folder / "sweep.toml").write_text(
        f'run = "{draft.folder / "run.toml"}"\n[grid]\nseed = [1, 2]\noptimizer.peak_lr = [1e-3]\n'
    )
    options = ["--cluster", str(draft.cluster_file(nodes=1)), "--out", str(draft.folder / "sweep")]
    launched = draft.outlast("sweep", "sweep.toml", *options)
    assert launched.returncode == 0, launched.stderr
    runs = [SlurmRun(dir, cluster, draft.folder) for dir in sweep_runs(draft.folder / "sweep") or []]
    first, _ = runs
    assert [run.job_id.partition("_")[2] for run in runs] == ["0", "1"]
    assert len({run.job_id.partition("_")[0] for run in runs}) == 1
    for run in runs:
        run.wait_for_step(30)
    os.kill(node_task(first, node=0), signal.SIGTERM)
    first.wait_for_job_run(1)
    for run in runs:
        assert run.wait_for_end()["exit_code"] == 0
    assert [len(run.events("requeued")) for run in runs] == [1, 0]
    shown = draft.outlast("sweep", str(draft.folder / "sweep"), "--results", "--json")
    rows = json.loads(shown.stdout)
    assert sorted(row["fields"]["seed"] for row in rows) == [1, 2]
    assert [row["val_loss"] for row in rows] == sorted(row["val_loss"] for row in rows)
    status = draft.outlast("status", str(draft.folder / "sweep"), "--json")
    assert [row["state"] for row in json.loads(status.stdout)] == ["finished", "finished"]
    again = draft.outlast("sweep", str(draft.folder / "sweep"))
    assert (again.returncode, again.stderr) == (0, "no run is left to start\n")


# No container runtime can be had where these tests run: programs of the same names and options stand in for
# them. What they start is real.
APPTAINER = """#!{python}
import os, sys
arguments = sys.argv[2:]
while arguments[0].startswith("-"):
    arguments.pop(0)
image, *command = arguments
assert sys.argv[1] == "exec" and image == "{image}", sys.argv
os.environ["APPTAINER_CONTAINER"] = image
os.execvp(command[0], command)
"""
SRUN_WITH_PYXIS = """#!{python}
import os, sys
kept = [argument for argument in sys.argv[1:] if not argument.startswith("--container-")]
assert "--container-image={image}" in sys.argv, sys.argv
os.environ["PATH"] = "{inside}"  # no scontrol in the image
os.execv("{srun}", ["srun", *kept])
"""


def put_program(folder: Path, name: str, text: str, **fields: object) -> list[str]:
    """The setup line that finds program `name` first."""
    folder.mkdir()
    (folder / name).write_text(text.format(python=sys.executable, **fields))
    (folder / name).chmod(0o755)
    return [f'export PATH="{folder}:$PATH"']


def test_apptainer_runs_the_workers_and_a_hang_inside_is_detected(
    new_slurm_run: NewRun, reference: list[float]
) -> None:
    run = new_slurm_run(launch__hang_timeout_s=20)
    image = str(run.folder / "image.sif")
    Path(image).touch()
    setup = put_program(run.folder / "bin", "apptainer", APPTAINER, image=image)
    container = {"runtime": "apptainer", "image": image, "python": sys.executable}
    run.launch(setup=setup, container=container)
    run.wait_for_step(60)
    pid = run.owner()["workers"][1]["pid"]
    assert f"APPTAINER_CONTAINER={image}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    run.preempt()
    run.wait(lambda: len(run.events("resumed")) == 1)
    run.wait_for_step(run.events("resumed")[0]["step"] + 20)
    run.kill_worker(1, signal.SIGSTOP)
    run.wait(lambda: bool(run.events("hang")))
    assert run.events("hang")[0]["culprit"].startswith("rank 1 on ")
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference


def test_batch_script_requeues_the_job_under_pyxis(
    new_slurm_run: NewRun, cluster: SlurmCluster, reference: list[float]
) -> None:
    run = new_slurm_run()
    inside = run.folder / "inside"
    inside.mkdir()
    setup = put_program(
        run.folder / "bin", "srun", SRUN_WITH_PYXIS, image="i", inside=inside, srun=shutil.which("srun")
    )
    run.launch(setup=setup, container={"runtime": "pyxis", "image": "i", "python": sys.executable})
    run.wait_for_step(60)
    run.preempt()
    run.wait(lambda: len(run.events("continued")) == 1)
    assert len(run.events("requeued")) == 1
    saved = [event["step"] for event in run.events("checkpoint_saved")]
    assert run.events("resumed")[0]["step"] in saved
    assert run.events("continued")[0]["lost_steps"] == 0
    assert run.wait_for_end()["exit_code"] == 0
    assert run.losses() == reference

    again = new_slurm_run(schedule__total_steps=100_000)
    again.launch(
        setup=[f'export PATH="{run.folder / "bin"}:$PATH"'],
        container={"runtime": "pyxis", "image": "i", "python": sys.executable},
    )
    again.wait_for_step(20)
    cluster.run("scancel", again.job_id)
    wait_for(lambda: cluster.field(again.job_id, "JobState") == "CANCELLED", 60)
    assert again.status()["state"] == "cancelled"


def test_rehearsal_passes_on_two_nodes(new_slurm_run: NewRun) -> None:
    run = new_slurm_run(batch__global_batch_tokens=12 * 32, batch__micro_batch=2)
    options = ["--cluster", str(run.cluster_file()), "--run-dir", str(run.folder / "rehearsal")]
    done = run.outlast("rehearse", str(run.folder / "run.toml"), *options, "--steps", "60", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    disturbed = RunDir(run.folder / "rehearsal" / "disturbed")
    worlds = [
        line["world_size"] for line in record.read(disturbed.events) if line["event"] == "attempt_started"
    ]
    assert worlds == [2, 2, 1]
