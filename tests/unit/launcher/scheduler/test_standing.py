"""How a job stands, and who is asked how often: a scheduler that answers, waits, or is silent.

Slurm's commands are stood in for here; tests/slurm has the real ones.
"""

import os
import signal
import socket
import subprocess
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
from launcher.commands import launch
from launcher.commands.logs import lines
from launcher.commands.progress import Follower, watch
from launcher.commands.status import statuses
from launcher.runs.recipes import run_tables
from launcher.runs.stop_request import request_stop
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.jobs import refuse_while_alive
from tests.unit.launcher.support import job_record


class Scheduler:
    """What squeue says of job 7 second by second (the last word stays), and what it is asked when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, words: dict[int, str]) -> None:
        self.words, self.now, self.asked = words, 0.0, list[tuple[float, str]]()
        monkeypatch.setattr(slurm, "_ask", self._ask)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    @property
    def word(self) -> str:
        return self.words[max(second for second in self.words if second <= self.now)]

    def times_of(self, command: str) -> list[float]:
        return [at for at, asked in self.asked if asked == command]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 3600, "nobody ends this"

    def _ask(
        self, command: list[str], _question: str | None = None
    ) -> "subprocess.CompletedProcess[str] | None":
        self.asked.append((self.now, command[0]))
        if self.word == "SILENT":
            return None
        if command[0] == "scancel":
            assert command == ["scancel", "--state=PENDING", "7"]
            if self.word == "PENDING":
                self.words = {0: "COMPLETING", int(self.now) + 7: "CANCELLED"}
        said = {"squeue": f"7|{self.word}|None|node1\n", "scontrol": f"JobId=7 JobState={self.word}\n"}
        return subprocess.CompletedProcess(command, 0, said.get(command[0], ""), "")


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


def test_a_job_that_comes_back_into_the_queue_while_it_is_stopped_is_taken_out(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(monkeypatch, {0: "RUNNING", 8: "COMPLETING", 12: "PENDING"})
    assert launch.stop(str(run.path), now=False) == 0
    assert capsys.readouterr().err == "saving, then stopping\ntaken out of the queue; it had not begun\n"
    outcome = read_json(run.submission(1).outcome)
    assert outcome is not None
    assert outcome["exit_code"] == 75
    assert len(scheduler.times_of("scancel")) == 1


def test_a_job_that_starts_just_then_is_left_to_see_the_request_itself(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(monkeypatch, {0: "PENDING", 60: "RUNNING"})
    before = slurm.cancel_waiting

    def start_just_before(job_id: str) -> None:
        scheduler.words = {0: "RUNNING", 20: "COMPLETED"}
        before(job_id)

    monkeypatch.setattr(slurm, "cancel_waiting", start_just_before)
    assert launch.stop(str(run.path), now=False) == 1  # this stand-in wrote no outcome
    assert not (run.submission(1).outcome).exists()


def test_stop_does_not_wait_for_ever_for_a_scheduler_that_is_silent(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(monkeypatch, {0: "RUNNING", 30: "SILENT", 60: "RUNNING", 90: "SILENT"})
    assert launch.stop(str(run.path), now=False) == 1
    assert 210 <= scheduler.now < 220
    said = capsys.readouterr().err
    assert "nobody says here how slurm job 7 of login1 stands. The request stays" in said
    assert read_json(run.stop)


def test_ctrl_c_takes_a_watched_job_out_of_the_queue(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(monkeypatch, {0: "PENDING"})
    sleep = time.sleep

    def press(seconds: float) -> None:
        sleep(seconds)
        if 20 <= scheduler.now < 20.2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(time, "sleep", press)
    job = give_job(run, "slurm", "login1")
    outcome = watch(run, job, Follower(run), total_steps=10)
    assert outcome.exit_code == 75
    assert outcome.cause == "taken out of the queue; it had not begun"
    assert 20 < scheduler.times_of("scancel")[0] < 26


def test_the_schedulers_own_stop_takes_nothing_out_of_the_queue(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(monkeypatch, {0: "PENDING", 60: "COMPLETED"})
    request_stop(run, "SIGTERM", requeue=True)
    watch(run, give_job(run, "slurm", "login1"), Follower(run), total_steps=10)
    assert scheduler.times_of("scancel") == []


def test_logs_of_two_nodes_are_followed_together_and_the_scheduler_is_asked_every_five_seconds(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_stop(run, "outlast stop")  # who only reads ends nothing
    scheduler = Scheduler(monkeypatch, {0: "PENDING", 30: "RUNNING", 60: "COMPLETED"})
    for node in (0, 1):
        (run.submission(1).path / f"node-{node}.log").write_text(f"node {node} speaks\n")
    seen = []
    for line in lines(run, follow=True, attempt=None, node=None):
        seen.append((scheduler.now < 60, line))
        if len(seen) == 2:
            (run.submission(1).path / "node-0.log").open("a").write("and again\nand is cut o")
    assert seen == [
        (True, "[job 0001 node-0] node 0 speaks"),
        (True, "[job 0001 node-1] node 1 speaks"),
        (True, "[job 0001 node-0] and again"),
        (False, "[job 0001 node-0] and is cut o"),
    ]
    times = scheduler.times_of("squeue")
    assert 12 <= len(times) <= 13
    assert all(later - earlier >= 5 for earlier, later in pairwise(times))
    assert scheduler.times_of("scancel") == []


def test_a_run_whose_job_may_live_for_all_that_slurm_says_is_not_started_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scheduler(monkeypatch, {0: "SILENT"})
    with pytest.raises(LaunchError) as error:
        launch.resume(str(run.path), None, [], None, attend=None)
    assert exit_code_of(error.value) == 2
    assert str(error.value) == (
        f"whether Slurm job 7 of {run.path} has ended cannot be known here: squeue and scontrol do not "
        "answer. Try again once they do, or on a login node of that cluster; if you know that the job is "
        f"over, remove {run.job} first."
    )
    write_json(run.config, run_tables("tiny", ["data.path=/data"])[0])
    assert [(row.state, row.reason) for row in statuses([run])] == [("unknown", "Slurm is silent")]
    run.job.unlink()
    refuse_while_alive(run)


def test_a_local_job_of_another_machine_is_taken_over_with_a_warning(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = f"not-{socket.gethostname()}"
    give_job(run, "local", elsewhere)
    refuse_while_alive(run)
    assert capsys.readouterr().err.startswith(f"warning: the run's last job was on {elsewhere}; if it still")


def test_a_hundred_runs_that_slurm_has_forgotten_are_three_questions(
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
    answers = iter(
        [
            "0|RUNNING|None|node1\n1|CANCELLED|None|\n",
            "2|PENDING|Priority|\n",
            "3|CANCELLED by 0\n4|NODE_FAIL\n",
        ]
    )
    asked = []

    def ask(command: list[str], _question: str | None = None) -> "subprocess.CompletedProcess[str]":
        ids = [word.removeprefix("--jobs=").count(",") + 1 for word in command if "--jobs=" in word]
        asked.append((command[0], *ids))
        return subprocess.CompletedProcess(command, 0, next(answers), "")

    monkeypatch.setattr(slurm, "_ask", ask)
    rows = statuses(runs)
    assert asked == [("squeue",), ("squeue", 98), ("sacct", 97)]
    assert [(row.state, row.reason) for row in rows[:6]] == [
        ("running", "node1"),
        ("cancelled", "CANCELLED"),
        ("pending", "Priority"),
        ("cancelled", "CANCELLED"),
        ("lost", "NODE_FAIL"),
        ("lost", None),
    ]


def test_one_waiting_job_of_an_array_is_cancelled_without_naming_a_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(slurm, "_require", asked.append)
    slurm.cancel_waiting("7")
    slurm.cancel_waiting("7_1")
    assert asked == [["scancel", "--state=PENDING", "7"], ["scancel", "7_1"]]
