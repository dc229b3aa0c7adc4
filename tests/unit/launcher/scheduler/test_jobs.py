"""The state of a job, and how often a scheduler is asked about it: it answers, waits, or is silent."""

import os
import signal
import socket
import time
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import LaunchError
from gpt.config.run import RunConfig
from gpt.run.exit_codes import exit_code_of
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Job
from gpt.run.run_dir import RunDir
from launcher.commands.follow_job import follow_job
from launcher.commands.logs import lines
from launcher.commands.record_follower import RecordFollower
from launcher.commands.resume import resume
from launcher.commands.status import statuses
from launcher.commands.stop import stop
from launcher.runs.recipes import run_tables
from launcher.runs.stop_request import request_stop
from launcher.scheduler import slurm_commands
from launcher.scheduler.jobs import claim_start, job_state, refuse_while_alive
from tests.unit.launcher.fake_slurm import FakeJob, FakeSlurm
from tests.unit.launcher.support import give_job as give_local_job
from tests.unit.launcher.support import job_record

SILENT = "SILENT"


class SlurmWithClock(FakeSlurm):
    """Job 7 has `states` by the second (the last one stays), and sleeping moves the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, states: dict[int, str]) -> None:
        super().__init__()
        self.states, self.now, self.times = states, 0.0, list[float]()
        self.jobs["7"] = FakeJob()
        self.install(monkeypatch)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    @property
    def state(self) -> str:
        return self.states[max(second for second in self.states if second <= self.now)]

    def times_of(self, program: str) -> list[float]:
        return [at for at, command in zip(self.times, self.asked, strict=True) if command[0] == program]

    def before(self, command: list[str]) -> None:
        self.times.append(self.now)
        self.is_silent = self.state == SILENT
        if command[0] == "scancel":
            assert command == ["scancel", "--state=PENDING", "7"]
            if self.state == "PENDING":
                self.states = {0: "COMPLETING", int(self.now) + 7: "CANCELLED"}
        self.jobs["7"].state = self.state

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 3600, "nothing ends this"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_json(run.config, {})
    give_job(run, "slurm", "login1")
    return run


def give_job(run: RunDir, executor: str, host: str) -> Job:
    job = job_record(1, executor, "7", host, None, None, run.path.stat().st_ino, 0.0)
    job.write(run.job)
    run.submission(1).path.mkdir(parents=True, exist_ok=True)
    return job


def test_requeued_job_is_removed_from_the_queue_after_a_stop_request(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = SlurmWithClock(monkeypatch, {0: "RUNNING", 8: "COMPLETING", 12: "PENDING"})
    assert stop(str(run.path), now=False) == 0
    assert capsys.readouterr().err.splitlines() == [
        "saving, then stopping",
        "waiting for the workers to start; they see the request then",
        "removed from the queue; it had not started",
    ]
    outcome = read_json(run.submission(1).outcome)
    assert outcome is not None
    assert outcome["exit_code"] == 75
    assert len(slurm.times_of("scancel")) == 1


def test_job_that_starts_during_the_cancellation_serves_the_stop_request_itself(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = SlurmWithClock(monkeypatch, {0: "PENDING", 60: "RUNNING"})
    before = slurm_commands.cancel_pending

    def start_just_before(job_id: str) -> None:
        slurm.states = {0: "RUNNING", 20: "COMPLETED"}
        before(job_id)

    monkeypatch.setattr(slurm_commands, "cancel_pending", start_just_before)
    assert stop(str(run.path), now=False) == 1  # no process wrote an outcome
    assert not (run.submission(1).outcome).exists()


def test_stop_gives_up_on_a_scheduler_that_does_not_answer(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = SlurmWithClock(monkeypatch, {0: "RUNNING", 30: SILENT, 60: "RUNNING", 90: SILENT})
    assert stop(str(run.path), now=False) == 1
    assert 210 <= slurm.now < 220
    said = capsys.readouterr().err
    assert "the state of slurm job 7 on login1 is unknown from here. The stop request remains" in said
    assert read_json(run.stop)


def test_ctrl_c_removes_a_watched_job_from_the_queue(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = SlurmWithClock(monkeypatch, {0: "PENDING"})
    sleep = time.sleep

    def press(seconds: float) -> None:
        sleep(seconds)
        if 20 <= slurm.now < 20.2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(time, "sleep", press)
    job = give_job(run, "slurm", "login1")
    outcome = follow_job(run, job, RecordFollower(run), total_steps=10)
    assert outcome.exit_code == 75
    assert outcome.cause == "removed from the queue; it had not started"
    assert 20 < slurm.times_of("scancel")[0] < 26


def test_stop_by_the_scheduler_removes_nothing_from_the_queue(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = SlurmWithClock(monkeypatch, {0: "PENDING", 60: "COMPLETED"})
    request_stop(run, "SIGTERM", requeue=True)
    follow_job(run, give_job(run, "slurm", "login1"), RecordFollower(run), total_steps=10)
    assert slurm.times_of("scancel") == []


def test_logs_follow_two_nodes_and_ask_slurm_every_five_seconds(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_stop(run, "outlast stop")  # a command that only reads ends nothing
    slurm = SlurmWithClock(monkeypatch, {0: "PENDING", 30: "RUNNING", 60: "COMPLETED"})
    for node in (0, 1):
        (run.submission(1).path / f"node-{node}.log").write_text(f"node {node} speaks\n")
    seen = []
    for line in lines(run, follow=True, attempt=None, node=None):
        seen.append((slurm.now < 60, line))
        if len(seen) == 2:
            (run.submission(1).path / "node-0.log").open("a").write("and again\nand is cut o")
    assert seen == [
        (True, "[job 0001 node-0] node 0 speaks"),
        (True, "[job 0001 node-1] node 1 speaks"),
        (True, "[job 0001 node-0] and again"),
        (False, "[job 0001 node-0] and is cut o"),
    ]
    times = slurm.times_of("squeue")
    assert 12 <= len(times) <= 13
    assert all(later - earlier >= 5 for earlier, later in pairwise(times))
    assert slurm.times_of("scancel") == []


def test_run_with_a_job_of_unknown_state_is_not_started_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlurmWithClock(monkeypatch, {0: SILENT})
    with pytest.raises(LaunchError) as error:
        resume(str(run.path), None, [], None, attend=None)
    assert exit_code_of(error.value) == 2
    assert str(error.value) == (
        f"it is unknown whether Slurm job 7 of {run.path} has ended: squeue and scontrol do not answer here. "
        "Try again once they do, or on a login node of that cluster. If you know that the job is over, "
        f"remove {run.job} first."
    )
    write_json(run.config, run_tables("tiny", ["data.path=/data"])[0])
    assert [(row.state, row.reason) for row in statuses([run])] == [("unknown", "Slurm does not answer")]
    run.job.unlink()
    refuse_while_alive(run)


def test_local_job_of_another_machine_is_taken_over_with_a_warning(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = f"not-{socket.gethostname()}"
    give_job(run, "local", elsewhere)
    refuse_while_alive(run)
    assert capsys.readouterr().err.startswith(f"warning: the run's last job was on {elsewhere}. If it is")


def test_status_of_a_hundred_runs_asks_slurm_three_questions(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for number in range(100):
        runs.append(RunDir(run.path.with_name(f"run-{number:03d}")))
        runs[-1].path.mkdir()
        tables = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}}
        write_json(runs[-1].config, validate(RunConfig, tables, "x").resolve(64).model_dump(mode="json"))
        job = job_record(1, "slurm", str(number), "login1", None, None, runs[-1].path.stat().st_ino, 0.0)
        job.write(runs[-1].job)
    slurm = FakeSlurm()
    slurm.jobs = {"0": FakeJob(), "1": FakeJob("CANCELLED", nodes="")}
    slurm.jobs_of_others = {"2": FakeJob("PENDING", reason="Priority", nodes="")}
    slurm.accounting = {"3": "CANCELLED by 0", "4": "NODE_FAIL"}
    slurm.install(monkeypatch)
    rows = statuses(runs)
    asked = [(command[0], _number_of_jobs(command)) for command in slurm.asked]
    assert asked == [("squeue", 0), ("squeue", 98), ("sacct", 97)]
    assert [(row.state, row.reason) for row in rows[:6]] == [
        ("running", "node1"),
        ("cancelled", "CANCELLED"),
        ("pending", "Priority"),
        ("cancelled", "CANCELLED"),
        ("lost", "NODE_FAIL"),
        ("lost", None),
    ]


def test_pending_job_of_an_array_is_cancelled_without_naming_a_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm = FakeSlurm()
    slurm.install(monkeypatch)
    slurm_commands.cancel_pending("7")
    slurm_commands.cancel_pending("7_1")
    assert slurm.asked == [["scancel", "--state=PENDING", "7"], ["scancel", "7_1"]]


def _number_of_jobs(command: list[str]) -> int:
    return sum(word.count(",") + 1 for word in command if word.startswith("--jobs="))


def test_a_run_is_started_by_one_command_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with claim_start(run), pytest.raises(LaunchError, match="is being started by another command"):
        claim_start(run)
    claim_start(run).close()


def test_a_job_whose_process_was_never_seen_has_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    job = give_local_job(run, alive=False)
    assert job_state(run, job.model_copy(update={"process": None, "pid": 2**22 - 1})) == "ended"


def test_a_foreign_job_id_does_not_hide_the_other_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm()
    slurm.jobs = {"7": FakeJob()}
    slurm.install(monkeypatch)
    found = slurm_commands.standings(["7", "8_2", "9", "--all", "abc"])
    assert {job_id: standing.state for job_id, standing in found.items()} == {
        "7": "running", "8_2": "ended", "9": "ended", "--all": "unknown", "abc": "unknown",
    }  # fmt: skip
    assert [word for command in slurm.asked for word in command if "--jobs" in word] == ["--jobs=8_2,9"]
