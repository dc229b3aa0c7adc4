"""How the node task ends and what it leaves, under submitit's local executor and a real torchrun."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import verify
from gpt.run import record
from gpt.run.events import Event, read_events
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Health, Job, JobOutcome, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.follow_job import outcome_of
from launcher.node.torchrun import worker_environment
from launcher.process_tree import identity
from launcher.runs.job_record import read_job
from launcher.runs.stop_request import request_stop
from launcher.runs.store import read_config
from launcher.scheduler.jobs import ask_to_stop, job_state, refuse_while_alive
from launcher.scheduler.protocol import NodeIdentity
from launcher.scheduler.registry import scheduler_of
from tests.unit.gpt.checkpoint.support import write_checkpoint
from tests.unit.launcher.support import (
    is_alive,
    job_outcome,
    job_record,
    kill_tree,
    make_run,
    processes_naming,
    start,
    tree,
    wait_for,
    worker_pid,
)

WAIT_FOR_STOP = """
if rank == 0:
    number = claim()
while not run.stop.exists():
    time.sleep(0.05)
if rank == 0:
    finish(number, 75, "stopped: " + json.loads(run.stop.read_text())["reason"])
"""
FOREVER = """
number = claim()
time.sleep(600)
"""
WRITES_75_WHEN_TERMINATED = """
def drain(*_):
    (run.path / "drained").write_text("yes")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
(run.path / "tracking-pid").write_text(str(os.getpid()))
time.sleep(600)
"""


HERE = NodeIdentity("local-1", 0, 0, 1, "here", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path for a run directory, next to its folder for temporary files.

    Processes that still use it afterwards are killed, so that one failure does not cause others.
    """
    path = tmp_path / "run"
    temporary_files(path).mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary_files(path)))
    yield path
    kill_tree(path)


def limit(run: RunDir, **limits: float) -> None:
    """Set fields of [launch] in the run's config."""
    config = read_json(run.config) or {}
    write_json(run.config, {**config, "launch": {**config["launch"], **limits}})


def temporary_files(run: Path) -> Path:
    return run.with_name("tmp")


def end_of(run: RunDir, job: Job) -> JobOutcome:
    """Wait for the end of the job, and check that it leaves nothing; its outcome."""
    wait_for(lambda: job.pid is not None and not is_alive(job.pid))
    assert list(temporary_files(run.path).iterdir()) == []
    assert job_state(run, job) == "ended"
    assert processes_naming(str(run.path)) == []
    return outcome_of(run, job)


def test_outcome_is_the_result_of_the_workers(folder: Path) -> None:
    run = make_run(folder, 'finish(claim(), 0, "all 10 steps are done")')
    assert end_of(run, start(run)) == job_outcome(0, "all 10 steps are done", 1)


def test_outcome_ignores_the_exit_code_of_torchrun(folder: Path) -> None:
    run = make_run(folder, 'finish(claim(), 93, "no intact checkpoint")')
    assert end_of(run, start(run)) == job_outcome(93, "no intact checkpoint", 1)


def test_killed_worker_is_restarted_with_the_others(folder: Path) -> None:
    run = make_run(
        folder,
        """
import torch.distributed as dist
from datetime import timedelta
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store = dist.PrefixStore(f"restart-{generation}", store)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
number = claim() if rank == 0 else None
dist.barrier()
if generation < 1 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    dist.barrier()
except RuntimeError:
    os._exit(1)  # a normal exit may wait for gloo's threads
if rank == 0:
    finish(number, 0, f"generation {generation}")
""",
        processes=2,
    )
    assert end_of(run, start(run)) == job_outcome(0, "generation 1", 2)


@pytest.mark.chaos  # half a minute: torchrun's own wait between SIGTERM and SIGKILL
def test_peer_that_waits_forever_does_not_delay_the_restart(folder: Path) -> None:
    # Like a rank in an NCCL kernel when its peer has died, this one ignores SIGTERM and never ends.
    run = make_run(
        folder,
        """
if generation < 1:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
if rank == 0:
    finish(claim(), 0, f"generation {generation}")
""",
        processes=2,
    )
    started = time.monotonic()
    assert end_of(run, start(run)) == job_outcome(0, "generation 1", 1)
    assert time.monotonic() - started < 60  # launch.collective_timeout_s is 1200


def test_worker_that_hangs_at_the_start_is_named_and_ends_the_job_run_after_two_hangs(folder: Path) -> None:
    run = make_run(
        folder,
        """
from gpt.run.heartbeat import WAITING, Heartbeat
heartbeat = Heartbeat()
heartbeat.beat(0, "importing" if rank else WAITING, is_starting=True)
time.sleep(600)
""",
        processes=2,
    )
    limit(run, hang_timeout_s=1, start_timeout_s=2, max_failures=2)
    outcome = end_of(run, start(run))
    assert outcome.exit_code == 93
    assert outcome.cause.startswith(
        "the workers hang before they belong to an attempt: the other ranks wait for"
    )
    hang, again = [line for line in record.read(run.events) if line["event"] == "hang"]
    host = os.uname().nodename
    assert hang["culprit"] == (
        f"the other ranks wait for rank 1 on {host}, which is not waiting; importing: state S in /proc"
    )
    assert hang["attempt"] is None  # the workers had claimed none
    assert again["culprit"] == hang["culprit"]  # the second one ended the job run


CRASHES = """
marker = run.path / f"generation-{generation}"
marker.touch()
raise RuntimeError("no interface ib9")
"""


def test_workers_that_crash_before_an_attempt_end_the_run_with_their_error(folder: Path) -> None:
    run = make_run(folder, CRASHES)
    limit(run, max_failures=2)
    outcome = end_of(run, start(run))
    assert (outcome.exit_code, outcome.attempt) == (93, None)
    assert re.fullmatch(  # torchrun may be quicker than the node task looks
        r"the workers crashed \d+ times in a row before an attempt began: RuntimeError: no interface ib9 "
        r"\(the output is in 0001/node-0\.log\)",
        outcome.cause,
    )
    [*_, crash] = read_events(run.events, Event.WORKERS_CRASHED)
    assert (crash["times"] >= 2, crash["cause"]) == (True, "RuntimeError: no interface ib9")


def test_stop_request_ends_workers_that_crash_before_an_attempt(folder: Path) -> None:
    run = make_run(folder, CRASHES)
    limit(run, max_failures=1000)
    job = start(run)
    wait_for(lambda: (run.path / "generation-1").exists())
    request_stop(run, "outlast stop")
    outcome = end_of(run, job)
    assert outcome.exit_code == 1
    assert "before an attempt began: RuntimeError: no interface ib9" in outcome.cause


def test_torchrun_that_starts_no_workers_again_is_ended(folder: Path) -> None:
    """A stopped agent does not notice that its worker has been killed."""
    run = make_run(folder, FOREVER)
    limit(run, hang_timeout_s=1, start_timeout_s=60, collective_timeout_s=90)
    job = start(run)
    wait_for(lambda: worker_pid(run, 0, 0) and run.attempt_numbers())
    time.sleep(1.2)  # the node task has seen the worker
    [agent] = [pid for pid in tree(job) if "torch.distributed.run" in command_line(pid)]
    os.kill(agent, signal.SIGSTOP)
    os.kill(worker_pid(run, 0, 0) or 0, signal.SIGKILL)
    outcome = end_of(run, job)
    assert outcome.exit_code == 1
    assert re.match(
        r"torchrun has no workers for launch.hang_timeout_s: torchrun on .* \(process \d+, state T in "
        r"/proc\) has had no workers for \d s \(the output is in 0001/node-0\.log\)$",
        outcome.cause,
    )


def test_workers_that_end_without_a_result_fail_with_their_last_output(folder: Path) -> None:
    run = make_run(folder, 'print("the last words", flush=True)')
    outcome = end_of(run, start(run))
    assert (outcome.exit_code, outcome.attempt) == (1, None)
    assert outcome.cause == "the workers ended without a result (torchrun: 0)\nthe last words"
    assert [e["cause"] for e in record.read(run.events) if e["event"] == "failed"] == [
        "the workers ended without a result (torchrun: 0)"
    ]


def test_failure_becomes_the_result_of_an_attempt_without_one(folder: Path) -> None:
    run = make_run(folder, "claim()")
    assert end_of(run, start(run)).attempt == 1
    result = read_json(run.attempt(1).result)
    assert result is not None
    assert result["exit_code"] == 1


def test_result_of_an_earlier_submission_does_not_count(folder: Path) -> None:
    run = make_run(folder, "pass")
    run.attempt(1).path.mkdir()
    write_json(run.attempt(1).result, {"exit_code": 0, "cause": "done long ago"})
    assert end_of(run, start(run)).exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signal_to_the_node_task_becomes_a_stop_request(folder: Path, number: signal.Signals) -> None:
    run = make_run(folder, WAIT_FOR_STOP)
    job = start(run)
    wait_for(lambda: run.attempt_numbers())
    [task] = [pid for pid in tree(job) if "submitit.core._submit" in command_line(pid)]
    os.kill(task, number)
    assert end_of(run, job) == job_outcome(75, f"stopped: {number.name}", 1)


def test_sigterm_to_the_controller_saves_and_stops(folder: Path) -> None:
    run = make_run(folder, WAIT_FOR_STOP)
    job = start(run)
    wait_for(lambda: run.attempt_numbers())
    assert job.pid is not None
    os.kill(job.pid, signal.SIGTERM)
    assert end_of(run, job) == job_outcome(75, "stopped: SIGTERM", 1)


def test_stop_request_reaches_the_workers(folder: Path) -> None:
    run = make_run(folder, WAIT_FOR_STOP, processes=2)
    job = start(run)
    wait_for(lambda: run.attempt_numbers())
    request_stop(run, "outlast stop")
    assert end_of(run, job) == job_outcome(75, "stopped: outlast stop", 1)


def test_job_is_asked_to_stop_although_the_request_cannot_be_written(folder: Path) -> None:
    run = make_run(
        folder,
        """
signal.signal(signal.SIGTERM, lambda *_: (finish(1, 75, "stopped: SIGTERM"), os._exit(0)))
claim()
time.sleep(600)
""",
    )
    job = start(run)
    wait_for(run.attempt_numbers)
    (folder / f".stop.{os.getpid()}").mkdir()  # where the request is written first
    said: list[str] = []
    ask_to_stop(run, "outlast stop", said.append)
    assert end_of(run, job) == job_outcome(75, "stopped: SIGTERM", 1)
    [sentence] = said
    assert sentence.startswith("the stop request cannot be written ([Errno 21] Is a directory")
    assert sentence.endswith(f"; process {job.pid} of the job got SIGTERM")
    with pytest.raises(LaunchError, match="cannot be signalled from here"):
        ask_to_stop(run, "outlast stop --now", said.append, now=True)


def test_signal_during_a_submission_stops_the_job_that_it_made(folder: Path) -> None:
    run = make_run(folder, WAIT_FOR_STOP)
    program = f"""
import os, signal
from pathlib import Path
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands import follow_job, submit
started = submit.subprocess.run
def run(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)  # while the scheduler accepts the job
    return started(*arguments, **options)
submit.subprocess.run = run
cluster = ClusterConfig(kind="local")
raise SystemExit(follow_job.submit_and_follow(RunDir(Path({str(folder)!r})), 10, cluster, "launch", False))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert f"continue with: outlast resume {folder}" in done.stderr
    job = read_job(run)
    assert job is not None
    assert end_of(run, job) == job_outcome(75, "stopped: Ctrl-C", 1)


def test_run_directory_that_is_moved_away_is_not_made_anew_and_ends_the_run_with_93(folder: Path) -> None:
    run = make_run(folder, FOREVER)
    job = start(run)
    wait_for(run.attempt_numbers)
    folder.rename(folder.with_name("elsewhere"))
    wait_for(lambda: job.pid is not None and not is_alive(job.pid))
    assert not folder.exists()
    outcome = outcome_of(run, job)
    assert outcome.exit_code == 93
    assert "is gone: the run directory was moved or deleted while the run was going" in outcome.cause
    moved = RunDir(folder.with_name("elsewhere"))
    assert read_job(moved) == job
    refuse_while_alive(moved)


def test_node_task_whose_controller_is_gone_before_it_starts_ends(folder: Path) -> None:
    run = make_run(folder, FOREVER)
    run.submission(1).path.mkdir(parents=True)
    task = f"from launcher.node.task import NodeTask; NodeTask({str(folder)!r}, '0001')()"
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {**os.environ, **run.code_environment, "SUBMITIT_LOCAL_JOB_ID": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", task], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert run.attempt_numbers() == []
    assert list(temporary_files(folder).iterdir()) == []


def test_stop_now_kills_the_workers_without_saving(folder: Path) -> None:
    run = make_run(folder, FOREVER)
    job = start(run)
    wait_for(lambda: run.attempt_numbers())
    request_stop(run, "outlast stop --now", now=True)
    assert end_of(run, job) == job_outcome(1, "stopped at once without saving, as requested", 1)


def test_later_stop_request_can_only_be_more_urgent(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    seen = []
    for reason, now in (
        ("first", False),
        ("second", False),
        ("third", True),
        ("fourth", False),
        ("fifth", True),
    ):
        request_stop(run, reason, now=now)
        stop = read_json(run.stop)
        assert stop is not None
        seen.append((stop["reason"], stop["now"]))
    assert seen == [("first", False)] * 2 + [("third", True)] * 3


def test_submission_removes_an_old_stop_request(folder: Path) -> None:
    run = make_run(folder, 'finish(claim(), 0, "stop exists: " + str(run.stop.exists()))')
    request_stop(run, "of yesterday", now=True)
    assert end_of(run, start(run)) == job_outcome(0, "stop exists: False", 1)


@pytest.mark.parametrize(
    "victim", ["submitit.core._submit", "submitit.local._local", "torch.distributed.run"]
)
def test_killed_process_leaves_no_orphan(folder: Path, victim: str) -> None:
    tracking = "import sys, time\ntime.sleep(0 if '--last-pass' in sys.argv else 600)"
    run = make_run(folder, FOREVER, processes=2, tracking=tracking)
    job = start(run)
    wait_for(lambda: worker_pid(run, 0, 0) and worker_pid(run, 0, 1))
    family = tree(job)
    assert len(family) == 6  # controller, node task, tracking sidecar, agent, two workers
    [pid] = [pid for pid in family if victim in command_line(pid)]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in family))
    wait_for(lambda: list(temporary_files(folder).iterdir()) == [])
    assert job_state(run, job) == "ended"
    if victim == "torch.distributed.run":
        assert outcome_of(run, job).cause.startswith("the workers ended without a result (torchrun: -9)")
    else:
        assert outcome_of(run, job).cause.startswith("the job ended without reporting an outcome")


def test_process_in_another_session_does_not_outlive_the_job(folder: Path) -> None:
    run = make_run(
        folder,
        """
import subprocess
command = [sys.executable, "-c", "import time; time.sleep(600)", str(run.path)]
stray = subprocess.Popen(command, start_new_session=True)
(run.path / "stray").write_text(str(stray.pid))
finish(claim(), 0, "done")
""",
    )
    assert end_of(run, start(run)) == job_outcome(0, "done", 1)
    assert not is_alive(int((run.path / "stray").read_text()))


def test_job_waits_for_the_tracking_sidecar_to_drain(folder: Path) -> None:
    tracking = "import os, signal, sys, time\nfrom pathlib import Path\nfrom gpt.run.run_dir import RunDir\n"
    tracking += "run = RunDir(Path(sys.argv[1]))\n" + WRITES_75_WHEN_TERMINATED
    worker = """
while not (run.path / "tracking-pid").exists():
    time.sleep(0.05)
finish(claim(), 0, "done")
"""
    run = make_run(folder, worker, tracking=tracking)
    assert end_of(run, start(run)) == job_outcome(0, "done", 1)
    assert (run.path / "drained").read_text() == "yes"


def test_failure_of_the_tracking_sidecar_does_not_matter(folder: Path) -> None:
    run = make_run(folder, 'time.sleep(1); finish(claim(), 0, "done")', tracking="raise SystemExit(3)")
    assert end_of(run, start(run)) == job_outcome(0, "done", 1)


def test_a_killed_sidecar_is_started_again_and_a_last_pass_sends_what_is_left(folder: Path) -> None:
    """The worker kills the sidecar; the second one ends at SIGTERM without having sent anything."""
    tracking = """
import os, sys, time
from pathlib import Path
if "--last-pass" in sys.argv:
    Path(sys.argv[1], "last-pass").touch()
    sys.exit(0)
with Path(sys.argv[1], "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(600)
"""
    worker = """
def starts():
    path = run.path / "starts"
    return path.read_text().split() if path.exists() else []
while not starts():
    time.sleep(0.05)
os.kill(int(starts()[0]), signal.SIGKILL)
while len(starts()) < 2:
    time.sleep(0.05)
finish(claim(), 0, "done")
"""
    run = make_run(folder, worker, tracking=tracking)
    assert end_of(run, start(run)) == job_outcome(0, "done", 1)
    assert (run.path / "last-pass").exists()
    [event] = read_events(run.events, Event.SIDECAR_RESTARTED)
    assert (event["sidecar"], event["reason"]) == ("tracking", "its process ended with SIGKILL")
    health = SidecarHealth.read(run.sidecar_health(Sidecar.TRACKING))
    assert health is not None
    assert (health.health, health.restarts) == (Health.DEAD, 1), "the last pass writes the rest itself"


def test_last_checkpoint_is_mirrored_when_the_job_has_ended(folder: Path, tmp_path: Path) -> None:
    """The worker ends as soon as it has committed; the mirroring sidecar outlives it and copies."""
    (tmp_path / "second").mkdir()
    worker = f"""
import shutil
shutil.copytree({str(write_checkpoint(tmp_path / "saved", step=5))!r}, run.checkpoints / "step-00000005")
finish(claim(), 0, "done")
"""
    run = make_run(folder, worker)
    config = read_config(run)
    checkpoint = config.checkpoint.model_copy(update={"mirror": str(tmp_path / "second")})
    write_json(run.config, config.model_copy(update={"checkpoint": checkpoint}).model_dump(mode="json"))
    assert end_of(run, start(run)) == job_outcome(0, "done", 1)
    assert list(verify(tmp_path / "second" / "run" / "checkpoints" / "step-00000005")) == []


def test_job_runs_the_submitted_code_and_not_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = tmp_path / "checkout" / "gpt"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the current folder was imported')")
    monkeypatch.chdir(decoy.parent)
    run = make_run(folder, "import gpt.config.run; finish(claim(), 0, gpt.config.run.__file__)")
    assert end_of(run, start(run)) == job_outcome(0, str(run.code / "gpt" / "config" / "run.py"), 1)


def test_job_survives_the_terminal_of_its_submitter(folder: Path) -> None:
    run = make_run(folder, WAIT_FOR_STOP)
    program = f"from pathlib import Path; from gpt.run.run_dir import RunDir; \
from launcher.commands.submit import submit; \
submit(RunDir(Path({str(folder)!r})), 'launch'); print('submitted')"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as submitter:
        answer, _ = submitter.communicate(timeout=30)  # would hang if the job held the pipe open
    assert answer == "submitted\n"
    job = read_job(run)
    assert job is not None
    assert os.getsid(job.pid or 0) != submitter.pid
    wait_for(lambda: run.attempt_numbers())
    with pytest.raises(LaunchError, match=rf"already has a job \(local {job.job_id} on .*, running\)"):
        refuse_while_alive(run)
    request_stop(run, "test")
    assert end_of(run, job).exit_code == 75
    refuse_while_alive(run)


def test_failed_submission_says_why(folder: Path) -> None:
    run = make_run(folder, "pass")
    run.cluster.write_text("{}")
    with pytest.raises(
        LaunchError, match=r"(?s)^the submission failed:\n.*kind is missing and has no default"
    ):
        start(run)


def test_job_blocks_a_moved_run_but_not_a_copy(tmp_path: Path) -> None:
    original, copy = RunDir(tmp_path / "original"), RunDir(tmp_path / "copy")
    original.path.mkdir()
    process = identity(os.getpid())
    inode = original.path.stat().st_ino
    job = job_record(1, "local", str(os.getpid()), os.uname().nodename, os.getpid(), process, inode, 0.0)
    job.write(original.job)
    shutil.copytree(original.path, copy.path)
    assert read_job(copy) is None
    refuse_while_alive(copy)
    moved = RunDir(original.path.rename(tmp_path / "moved"))
    assert read_job(moved) == job
    with pytest.raises(LaunchError, match=r"already has a job"):
        refuse_while_alive(moved)


def test_reused_process_id_is_not_the_job(tmp_path: Path) -> None:
    mine = job_record(1, "local", "1", os.uname().nodename, os.getpid(), "another-boot/17", 0, 0.0)
    assert job_state(RunDir(tmp_path), mine) == "ended"


def test_local_job_of_another_host_is_unknown(tmp_path: Path) -> None:
    assert (
        job_state(RunDir(tmp_path), job_record(1, "local", "1", "elsewhere", os.getpid(), "x", 0, 0.0))
        == "unknown"
    )


def test_workers_share_the_cores_of_the_cpu() -> None:
    cores = len(os.sched_getaffinity(0))
    cluster = ClusterConfig(kind="local", processes_per_node=2)
    environment = worker_environment(cluster, HERE, 3, "", {"A": "b"})
    assert environment["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert environment["A"] == "b"


def test_slurm_node_uses_the_allocated_cores() -> None:
    here = NodeIdentity("slurm-7", 0, 0, 1, "node1", "7")
    environment = worker_environment(ClusterConfig(kind="slurm"), here, 0, "", {"SLURM_CPUS_ON_NODE": "1"})
    assert environment["OMP_NUM_THREADS"] == "1"


def test_environment_of_the_cluster_file_overrides_the_others() -> None:
    cluster = ClusterConfig(kind="local", environment={"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "INFO"})
    environment = worker_environment(cluster, HERE, 0, "", {"OMP_NUM_THREADS": "3"})
    assert (environment["OMP_NUM_THREADS"], environment["NCCL_DEBUG"]) == ("7", "INFO")


def test_local_job_uses_the_gpus_of_the_caller() -> None:
    cluster = ClusterConfig(kind="local", gpus_per_node=2)
    inherited = {"CUDA_VISIBLE_DEVICES": "0,1", "OUTLAST_CUDA_VISIBLE_DEVICES": "5,GPU-7,6"}
    assert worker_environment(cluster, HERE, 0, "", inherited)["CUDA_VISIBLE_DEVICES"] == "5,GPU-7"


def test_gpu_memory_is_allocated_in_segments_that_grow_unless_the_user_says_otherwise() -> None:
    def configured(inherited: dict[str, str], **cluster: Any) -> set[tuple[str, str]]:
        environment = worker_environment(ClusterConfig(kind="local", **cluster), HERE, 0, "", inherited)
        return {(name, value) for name, value in environment.items() if name.endswith("ALLOC_CONF")}

    assert configured({}, gpus_per_node=1) == {("PYTORCH_ALLOC_CONF", "expandable_segments:True")}
    assert configured({}, gpus_per_node=0) == set()
    for mine in ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "b:2"}):
        assert configured(mine, gpus_per_node=1) == set(mine.items())
        assert configured({}, gpus_per_node=1, environment=mine) == set(mine.items())


def test_slurm_node_task_outside_slurm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(LaunchError, match=r"^not inside a Slurm job: 'SLURM_NODEID' is not set$"):
        scheduler_of("slurm").node_identity()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""
