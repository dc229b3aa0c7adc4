"""The status of runs and its table."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from gpt.run.events import Event, record_event
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from launcher.commands.status import status, statuses
from launcher.commands.status_table import show, table
from tests.unit.launcher.commands.support import commit, record_step
from tests.unit.launcher.support import end_job, give_job


def test_a_run_that_was_never_submitted_is_created(run: RunDir) -> None:
    found = status(run)
    assert (found.state, found.step, found.total_steps, found.loss, found.checkpoint_step) == (
        "created", 0, 20, None, None,
    )  # fmt: skip


def test_a_running_run_shows_its_speed_and_remaining_time(run: RunDir) -> None:
    give_job(run, alive=True)
    run.attempt(1).path.mkdir()
    record_step(run, 4, **{"val/loss": 7.5})
    record_step(run, 5, **{"train/mfu": 0.4})
    commit(run, 4)
    for kernel in ("sdpa", "flash-2"):
        record_event(run.events, Event.NETWORK_BUILT, attention=kernel)
    found = status(run)
    assert found.state == "running"
    assert (found.mfu, found.attention) == (0.4, "flash-2")
    assert (found.step, found.tokens, found.loss, found.val_loss) == (5, 5 * 1024, 8.5, 7.5)
    assert (found.tokens_per_second, found.eta_s, found.checkpoint_step) == (100.0, 30.0, 4)


def test_a_failed_save_shows_until_a_later_one_succeeds(run: RunDir) -> None:
    give_job(run, alive=True)
    record_event(run.events, Event.CHECKPOINT_SAVED, step=4, bytes=1, seconds=1.0)
    record_event(run.events, Event.CHECKPOINT_FAILED, step=8, reason="No space left on device")
    assert status(run).save_problem == "the checkpoint of step 8 was not saved: No space left on device"
    console = Console(file=io.StringIO(), width=300)
    console.print(table([run]))
    assert isinstance(console.file, io.StringIO)
    assert (
        f"{run.path.name}: the checkpoint of step 8 was not saved: No space left" in console.file.getvalue()
    )
    record_event(run.events, Event.CHECKPOINT_SAVED, step=12, bytes=1, seconds=1.0)
    assert status(run).save_problem is None
    record_event(run.events, Event.MIRROR_FAILED, reason="no route to host")
    assert status(run).save_problem == "not mirrored: no route to host"
    record_event(run.events, Event.MIRRORED, step=12)
    assert status(run).save_problem is None


def test_crashes_before_an_attempt_are_the_reason_until_one_begins(run: RunDir) -> None:
    give_job(run, alive=True)
    record_event(run.events, Event.WORKERS_CRASHED, times=1, node="n1", cause="ValueError: no ib9")
    assert status(run).reason == "the workers crash before an attempt begins: ValueError: no ib9"
    record_event(run.events, Event.ATTEMPT_STARTED, attempt=1, world_size=2)
    assert status(run).reason is None


def test_a_run_with_a_stop_request_is_stopping(run: RunDir) -> None:
    give_job(run, alive=True)
    write_json(run.stop, {"reason": "test"})
    assert status(run).state == "stopping"


@pytest.mark.parametrize(
    ("exit_code", "word"), [(0, "finished"), (75, "stopped"), (93, "failed"), (1, "failed"), (2, "failed")]
)
def test_an_ended_run_shows_its_state_and_cause(run: RunDir, exit_code: int, word: str) -> None:
    give_job(run, alive=False)
    end_job(run, exit_code, "because")
    record_step(run, 5)
    found = status(run)
    assert (found.state, found.cause, found.tokens_per_second, found.eta_s) == (word, "because", None, None)


def test_a_run_without_an_outcome_is_lost(run: RunDir) -> None:
    give_job(run, alive=False)
    assert status(run).state == "lost"


def test_a_copied_run_directory_is_copied(run: RunDir) -> None:
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


def test_a_watched_table_refreshes_with_new_steps(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_seconds: float) -> None:
        if run.metrics.exists():
            raise KeyboardInterrupt
        record_step(run, 7)

    console = Console(width=180, force_terminal=True)
    monkeypatch.setattr("launcher.commands.status_table.time.sleep", work)
    monkeypatch.setattr("launcher.commands.status_table.Console", lambda: console)
    show(lambda: [run], watch=True)
    shown = capsys.readouterr().out
    assert shown.index("0/20") < shown.index("7/20")


def test_a_hundred_long_runs_take_less_than_a_second(run: RunDir) -> None:
    give_job(run, alive=False)
    record_step(run, 1, **{"val/loss": 7.0})
    run.metrics.write_bytes(run.metrics.read_bytes() * 5000)
    for event in (Event.ATTEMPT_STARTED, Event.REQUEUED, Event.CONTINUED, Event.NETWORK_BUILT):
        record_event(run.events, event, attempt=1, world_size=1, lost_s=1.5, attention="sdpa")
    run.events.write_bytes(run.events.read_bytes() * 30)
    record_event(run.events, Event.CHECKPOINT_SAVED, step=1, seconds=1.0, bytes=1 << 30)
    run.events.write_bytes(run.events.read_bytes() + run.events.read_bytes().splitlines(True)[-1] * 4000)
    found = status(run)
    assert (found.requeues, found.lost_s, found.attention) == (30, 29 * 1.5, "sdpa")
    started = time.process_time()
    for _ in range(100):
        status(run)
    assert time.process_time() - started < 1.0
