"""What is read back from a run directory: progress, status, logs, the changes that a resume may make."""

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.sampling.skip_list import Ranges
from gpt.checkpoint.format import committed, rank_name, step_name
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.exit_codes import exit_code_of
from gpt.run.json_file import read_json, write_json
from gpt.run.records import StopRequest
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands import launch
from launcher.commands.logs import lines, log_files
from launcher.commands.model_tools import tracking_uri, ui
from launcher.commands.progress import Attendance, Display, Follower, duration, outcome_of
from launcher.commands.status import show, status, statuses, table
from launcher.preflight.check import examine
from launcher.runs.recipes import run_tables
from launcher.runs.stop_request import pending_stop
from launcher.runs.store import changed_fields, create_run, open_run, read_config
from launcher.scheduler.jobs import claim_start, job_state
from launcher.units import size
from tests.unit.gpt.checkpoint.support import write_checkpoint
from tests.unit.launcher.support import end_job, give_job, make_data, submit_what_ends_well


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data: Path, tmp_path: Path) -> RunDir:
    tables, source = run_tables("tiny", [f"data.path={data}"])
    request = examine(tables, source, ClusterConfig(kind="local"), tmp_path / "run")
    return create_run(tmp_path / "run", request, ["outlast"])


def step(run: RunDir, number: int, **more: float) -> None:
    numbers = {"train/loss": 9.0 - number / 10, "train/tokens_per_second": 100.0, "train/step_seconds": 2.0}
    record.append(run.metrics, step=number, tokens=number * 1024, **numbers, **more)


def commit(run: RunDir, *steps: int, skipped: Ranges = ()) -> None:
    """Whole checkpoints of the run's network."""
    config = read_config(run)
    data = joint_fingerprint([read_manifest(source.path) for source in config.data.sources])
    for step in steps:
        fields = {"data_fingerprint": data, "skipped": skipped}
        write_checkpoint(run.checkpoints, step=step, world_size=1, config=config, **fields)


def spoil(run: RunDir, number: int) -> Path:
    """Change a byte of the checkpoint of step `number`."""
    path = run.checkpoints / step_name(number) / rank_name(0)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    return path


# Following


def test_a_follower_starts_where_the_record_stands(run: RunDir) -> None:
    step(run, 1)
    follower = Follower(run)
    step(run, 2)
    record_event(run.events, Event("resumed"), step=1)
    [update] = follower.updates(give_job(run, alive=False))
    assert [line["step"] for line in update.metrics] == [2]
    assert [event["event"] for event in update.events] == ["resumed"]


def test_a_follower_goes_on_where_a_restart_cut_the_record_back(run: RunDir) -> None:
    follower = Follower(run)
    seen = []
    updates = follower.updates(give_job(run, alive=True))
    for number in (1, 2, 3):
        step(run, number)
    seen.append([line["step"] for line in next(updates).metrics])
    record.cut_back(run.metrics, 1)
    seen.append([line["step"] for line in next(updates).metrics])
    step(run, 2)
    with run.metrics.open("a") as torn:
        torn.write('{"step": 3, ')
    seen.append([line["step"] for line in next(updates).metrics])
    assert seen == [[1, 2, 3], [], [2]]


def test_the_display_tells_restarts_saves_and_scores_in_plain_lines(run: RunDir) -> None:
    display = Display(10)
    output = io.StringIO()
    display.console = Console(file=output, width=200)
    follower = Follower(run)
    record_event(run.events, Event("attempt_started"), attempt=3, world_size=2)
    record_event(run.events, Event("checkpoint_saved"), step=4, seconds=1.25, bytes=3 << 20)
    record_event(run.events, Event("checkpoint_rejected"), path="step-8", reason="missing")
    record_event(run.events, Event("attempt_started"), attempt=4, world_size=2)
    record_event(run.events, Event("resumed"), step=4)
    record_event(run.events, Event("stop_requested"), reason="SIGTERM")
    record_event(run.events, Event("update_skipped"), step=5, reason="non-finite gradient")
    record_event(run.events, Event("phase"), name="data", seconds=1.0)
    step(run, 5)
    step(run, 6, **{"val/loss": 1.5, "val/bits_per_byte": 0.75})
    [update] = follower.updates(give_job(run, alive=False))
    display.show(update)
    assert output.getvalue().splitlines() == [
        "attempt 3, 2 processes",
        "step 4 is saved: 3.0 MiB in 1.2 s",
        "warning: step-8 is passed over: missing",
        "the workers start again: attempt 4, 2 processes",
        "continues from the checkpoint of step 4",
        "asked to stop: SIGTERM",
        "warning: step 5 left the weights as they were: non-finite gradient",
        "step 6: validation loss 1.5000, 0.7500 bits per byte",
        "step 6/10  loss 8.400  100 tokens/s  0:08 left",
    ]


def test_a_job_that_could_not_say_how_it_ended_is_a_failure(run: RunDir) -> None:
    outcome = outcome_of(run, give_job(run, alive=False))
    assert outcome.exit_code == 1
    assert outcome.cause == (
        f"the job ended without a word, as when its node is lost; its logs: {run.submission / '0001'}"
    )


# Status


def test_a_run_that_was_never_submitted_is_created(run: RunDir) -> None:
    found = status(run)
    assert (found.state, found.step, found.total_steps, found.loss, found.checkpoint_step) == (
        "created", 0, 20, None, None,
    )  # fmt: skip


def test_a_running_run_shows_speed_and_what_is_left(run: RunDir) -> None:
    give_job(run, alive=True)
    run.attempt(1).path.mkdir()
    step(run, 4, **{"val/loss": 7.5})
    step(run, 5, **{"train/mfu": 0.4})
    commit(run, 4)
    for kernel in ("sdpa", "flash-2"):
        record_event(run.events, Event("network_built"), attention=kernel)
    found = status(run)
    assert found.state == "running"
    assert (found.mfu, found.attention) == (0.4, "flash-2")
    assert (found.step, found.tokens, found.loss, found.val_loss) == (5, 5 * 1024, 8.5, 7.5)
    assert (found.tokens_per_second, found.eta_s, found.checkpoint_step) == (100.0, 30.0, 4)


def test_a_save_that_failed_shows_until_a_later_one_is_there(run: RunDir) -> None:
    give_job(run, alive=True)
    record_event(run.events, Event("checkpoint_saved"), step=4, bytes=1, seconds=1.0)
    record_event(run.events, Event("checkpoint_failed"), step=8, reason="No space left on device")
    assert status(run).save_problem == "step 8 is not saved: No space left on device"
    console = Console(file=io.StringIO(), width=300)
    console.print(table([run]))
    assert isinstance(console.file, io.StringIO)
    assert f"{run.path.name}: step 8 is not saved: No space left" in console.file.getvalue()
    record_event(run.events, Event("checkpoint_saved"), step=12, bytes=1, seconds=1.0)
    assert status(run).save_problem is None
    record_event(run.events, Event("mirror_failed"), reason="no route to host")
    assert status(run).save_problem == "not mirrored: no route to host"
    record_event(run.events, Event("mirrored"), step=12)
    assert status(run).save_problem is None


def test_a_stop_request_shows_while_the_job_lives(run: RunDir) -> None:
    give_job(run, alive=True)
    write_json(run.stop, {"reason": "test"})
    assert status(run).state == "stopping"


@pytest.mark.parametrize(
    ("exit_code", "word"), [(0, "finished"), (75, "stopped"), (93, "failed"), (1, "failed"), (2, "failed")]
)
def test_an_ended_run_shows_how_and_why(run: RunDir, exit_code: int, word: str) -> None:
    give_job(run, alive=False)
    end_job(run, exit_code, "because")
    step(run, 5)
    found = status(run)
    assert (found.state, found.cause, found.tokens_per_second, found.eta_s) == (word, "because", None, None)


def test_a_run_whose_node_was_lost_is_lost(run: RunDir) -> None:
    give_job(run, alive=False)
    assert status(run).state == "lost"


def test_a_copied_run_is_a_copy(run: RunDir) -> None:
    give_job(run, alive=True)
    run.attempt(1).path.mkdir()
    content = read_json(run.job)
    assert content is not None
    write_json(run.job, {**content, "run_inode": content["run_inode"] + 1})
    assert status(run).state == "copied"


def test_one_unreadable_run_does_not_hide_the_others(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    other.config.write_text("{}")
    assert [row.state for row in statuses([other, run])] == ["unreadable", "created"]
    console = Console(file=io.StringIO(), width=300)
    console.print(table([other, run]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "unreadable: config.json: name is missing and has no default" in text
    assert "0/20" in text


def test_a_watched_table_is_written_anew_with_what_is_new(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_seconds: float) -> None:
        if run.metrics.exists():
            raise KeyboardInterrupt
        step(run, 7)

    monkeypatch.setattr("launcher.commands.status.time.sleep", work)
    monkeypatch.setattr("launcher.commands.status.Console", lambda: Console(width=180, force_terminal=True))
    show(lambda: [run], watch=True)
    shown = capsys.readouterr().out
    assert shown.index("0/20") < shown.index("7/20")


def test_a_hundred_long_runs_take_less_than_a_second(run: RunDir) -> None:
    give_job(run, alive=False)
    step(run, 1, **{"val/loss": 7.0})
    run.metrics.write_bytes(run.metrics.read_bytes() * 5000)
    for name in ("requeued", "continued", "network_built"):
        record_event(run.events, Event(name), lost_s=1.5, attention="sdpa")
    run.events.write_bytes(run.events.read_bytes() * 30)
    record_event(run.events, Event("checkpoint_saved"), step=1, seconds=1.0, bytes=1 << 30)
    run.events.write_bytes(run.events.read_bytes() + run.events.read_bytes().splitlines(True)[-1] * 4000)
    found = status(run)
    assert (found.requeues, found.lost_s, found.attention) == (30, 45.0, "sdpa")
    started = time.process_time()
    for _ in range(100):
        status(run)
    assert time.process_time() - started < 1.0


# Logs


def test_logs_show_the_newest_attempt_and_the_newest_submission(run: RunDir) -> None:
    for submission in ("0001", "0002"):
        (run.submissions / submission).mkdir(parents=True)
        (run.submission / submission / "node-0.log").write_text(f"agent {submission}\n")
        (run.submission / submission / "tracking.log").write_text("mirror\n")
    for attempt in (1, 2):
        for node in (0, 1):
            folder = run.attempt(attempt).path / f"node-{node}"
            folder.mkdir(parents=True)
            (folder / f"rank-0000{node}.log").write_text(f"attempt {attempt} on {node}\nno newline")
    newest = list(lines(run, follow=False, attempt=None, node=None))
    assert newest == [
        "[job 0002 node-0] agent 0002",
        "[attempt 2 node-0 rank-00000] attempt 2 on 0",
        "[attempt 2 node-0 rank-00000] no newline",
        "[attempt 2 node-1 rank-00001] attempt 2 on 1",
        "[attempt 2 node-1 rank-00001] no newline",
    ]
    first = list(lines(run, follow=False, attempt=1, node=1))
    assert first == [
        "[attempt 1 node-1 rank-00001] attempt 1 on 1",
        "[attempt 1 node-1 rank-00001] no newline",
    ]
    with pytest.raises(LaunchError, match=r"^there is no attempt 7; there are: 1, 2$"):
        log_files(run, 7, None)
    for wanted in (None, 2):
        with pytest.raises(LaunchError, match=r"^there is no node 9; there are: 0, 1$"):
            list(lines(run, follow=False, attempt=wanted, node=9))


# Resuming


def resume(run: RunDir, *overrides: str, step: int | None = None) -> int:
    return launch.resume(str(run.path), None, overrides, step, attend=None)


def test_a_finished_run_is_left_as_it_is(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 10, 20)
    before = run.config.read_bytes()
    assert resume(run) == 0
    shown = capsys.readouterr()
    assert shown.err.endswith("finished already: step 20 of 20\n")
    assert shown.out == f"{run.path}\n"
    assert run.config.read_bytes() == before
    assert not run.job.exists()


def test_a_finished_run_whose_last_checkpoint_is_bad_takes_its_last_steps_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "submit", submit_what_ends_well)
    commit(run, 10, 20)
    path = spoil(run, 20)
    assert resume(run) == 0
    assert (
        f"the last checkpoint is bad, its steps are taken again: {path}: byte 0:" in capsys.readouterr().err
    )
    assert run.job.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=7", "seed cannot change in the middle of a run: 1234 → 7."),
        ("model.n_layers=3", "model.n_layers cannot change in the middle of a run: 2 → 3."),
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr cannot change in the middle of a run: 0.003 → 0.5."),
        ("batch.global_batch_tokens=2048", "batch.global_batch_tokens cannot change in the middle of a run"),
    ],
)
def test_what_makes_another_run_cannot_change_on_resume(run: RunDir, setting: str, words: str) -> None:
    before = run.config.read_bytes()
    with pytest.raises(ConfigError) as error:
        resume(run, setting)
    assert error.value.problems[0].startswith(words)
    assert exit_code_of(error.value) == 2
    assert run.config.read_bytes() == before


def test_what_may_change_on_resume_is_submitted_and_recorded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "submit", submit_what_ends_well)
    assert resume(run, "schedule.total_tokens=40960", "checkpoint.keep_last=5", "zero.stage=2") == 0
    config = read_json(run.config)
    assert config is not None
    assert (config["schedule"]["total_tokens"], config["checkpoint"]["keep_last"]) == (40960, 5)
    assert "total_steps" not in config["schedule"]
    [changed] = [event for event in record.read(run.events) if event["event"] == "config_changed"]
    assert changed["changes"] == {
        "checkpoint.keep_last": [3, 5],
        "schedule.total_steps": [20, None],
        "schedule.total_tokens": [None, 40960],
        "zero.stage": [1, 2],
    }
    assert "warning: schedule.total_tokens changes from None to 40960" in capsys.readouterr().err


def test_sequences_to_pass_over_must_come_after_the_step_that_is_resumed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "submit", submit_what_ends_well)
    commit(run, 5)
    commit(run, 10, skipped=((100, 120),))
    with pytest.raises(ConfigError) as error:
        resume(run, "data.skip=[[150, 160], [160, 190], [500, 501]]")
    assert error.value.problems == [
        "data.skip: [150, 190] begins among the 180 sequences that are behind step 10, and those have been "
        "read. Continue from a checkpoint before it (outlast resume --step), or begin the range at 180 or "
        "later."
    ]
    assert resume(run, "data.skip=[[150, 190]]", step=5) == 0
    assert (read_json(run.config) or {})["data"]["skip"] == [[150, 190]]


def test_resuming_from_an_older_step_puts_the_later_checkpoints_aside(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "submit", submit_what_ends_well)
    commit(run, 5, 10, 15)
    with pytest.raises(LaunchError, match=r"^there is no checkpoint of step 7; there are: 5, 10, 15\.$"):
        resume(run, step=7)
    spoil(run, 10)
    with pytest.raises(LaunchError, match=r"step 10 is bad: .*: byte 0: .*\. There are also: 5, 15\.$"):
        resume(run, step=10)
    assert [number for number, _ in committed(run.checkpoints)] == [5, 10, 15]
    assert resume(run, step=5) == 0
    names = sorted(entry.name for entry in run.checkpoints.iterdir())
    assert names[-1] == "step-00000005"
    assert [name.rpartition("step-")[2] for name in names[:-1]] == ["00000010", "00000015"]
    assert all(name.startswith(".before-") for name in names[:-1])


def test_changed_fields_are_dotted_and_old_stands_before_new() -> None:
    before: dict[str, Any] = {"a": 1, "b": {"c": 2, "d": [3]}, "gone": 4, "list": [{"f": 7}, {"f": 8}]}
    after: dict[str, Any] = {"a": 1, "b": {"c": 5, "d": [3]}, "new": {"e": 6}, "list": [{"f": 7}, {"f": 9}]}
    assert changed_fields(before, after) == {
        "b.c": [2, 5], "gone": [4, None], "new.e": [None, 6], "list.1.f": [8, 9]
    }  # fmt: skip


# Small things


def test_a_run_is_the_same_by_any_path_to_it(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    for path in (".", f"../{run.path.name}", "checkpoints/..", str(run.path)):
        assert open_run(path).path == run.path
    link = run.path.with_name("link")
    link.symlink_to(run.checkpoints)
    assert open_run(f"{link}/..").path == run.path  # as the system reads it
    assert open_run(run.path).path.name == "run"


def test_symbolic_links_keep_the_name_that_other_machines_know(run: RunDir) -> None:
    link = run.path.with_name("link")
    link.symlink_to(run.path)
    assert open_run(link).path == link


def test_runs_are_tracked_beside_themselves_or_where_their_config_says(run: RunDir) -> None:
    assert tracking_uri(run.path) == f"sqlite:///{run.path.parent / 'mlflow.db'}"
    assert tracking_uri(run.path.parent) == f"sqlite:///{run.path.parent / 'mlflow.db'}"
    config = read_json(run.config)
    assert config is not None
    write_json(run.config, {**config, "tracking": {"uri": "http://tracker:5000"}})
    assert tracking_uri(run.path) == "http://tracker:5000"


def test_a_tracking_server_is_only_named(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_json(run.config)
    assert config is not None
    write_json(run.config, {**config, "tracking": {"uri": "http://tracker:5000"}})
    assert ui(run.path, 5000) == 0
    assert capsys.readouterr().out == "http://tracker:5000\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90_061, "25:01:01")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_from_before_a_field_existed_can_be_resumed(run: RunDir) -> None:
    tables = read_json(run.config)
    assert tables is not None
    del tables["optimizer"]["eps"]
    write_json(run.config, tables)
    commit(run, int(tables["schedule"]["total_steps"]))
    assert resume(run) == 0


def test_a_run_is_started_by_one_command_at_a_time(run: RunDir) -> None:
    with claim_start(run), pytest.raises(LaunchError, match="is being started by another command"):
        claim_start(run)
    claim_start(run).close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reason": "x"}'])
def test_any_stop_file_is_a_request_to_save_and_stop(run: RunDir, content: str) -> None:
    assert pending_stop(run) is None
    run.stop.write_text(content)
    standing = pending_stop(run)
    assert standing is not None
    assert not standing.get("now")


def test_only_a_second_ctrl_c_after_a_while_ends_a_job_at_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("launcher.commands.progress.time.monotonic", lambda: clock[0])
    with Display(10) as display, Attendance(run, display) as attendance:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            attendance.answer()
        standing = pending_stop(run)
        assert standing is not None
        assert (standing["reason"], standing["now"]) == ("SIGTERM", False)
        clock[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        attendance.answer()
        assert (pending_stop(run) or StopRequest()).now is False
        os.kill(os.getpid(), signal.SIGINT)
        attendance.answer()
        assert (pending_stop(run) or StopRequest()).now is True
        with pytest.raises(KeyboardInterrupt):  # nobody may be able to say that the job has ended
            os.kill(os.getpid(), signal.SIGINT)


def test_a_job_whose_process_was_never_seen_has_ended(run: RunDir) -> None:
    job = give_job(run, alive=False)
    assert job_state(run, job.model_copy(update={"process": None, "pid": 2**22 - 1})) == "ended"
