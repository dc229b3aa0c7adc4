"""Whatever lies in one run directory, `outlast status` shows the other runs, and its JSON is valid."""

import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from gpt.run.events import Event, record_event
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir
from launcher.cli.inspecting import status as status_command
from launcher.commands.status import UNREADABLE, status, statuses
from launcher.commands.status_table import table
from launcher.runs.store import list_runs
from tests.unit.launcher.commands.support import commit, record_step, without_privileges
from tests.unit.launcher.support import end_job, give_job

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
HUGE = "9" * 5000
MARKUP = "[bold red]x[/nothing] :smile: \\u001b[31m \\ud800 \\n\\n" + "y" * 2000

BAD_RECORDS = ["", "{", "[]", "null", "\x00", DEEP, "{}"]
BAD_METRICS = [
    *BAD_RECORDS,
    '{"time": 1.0, "step": null}',
    '{"time": 1.0, "step": "abc"}',
    '{"time": 1.0, "step": 1e400}',
    '{"time": "x", "step": 9}',
    '{"time": 1e300, "step": 9}',
    '{"time": 1.0, "step": 9, "tokens": "many", "train/loss": [1], "val/loss": {"a": 1}, "train/mfu": "x"}',
    '{"time": 1.0, "step": 9, "tokens": null, "train/loss": NaN, "val/loss": Infinity}',
    '{"time": -1.0, "step": 9, "train/step_seconds": 1e308, "train/tokens_per_second": 1e308}',
    '{"time": 1.0, "step": 9, "train/step_seconds": 1e308, "train/tokens_per_second": 1e308}',
    f'{{"time": 1.0, "step": {HUGE}}}',
    f'{{"time": 1.0, "step": {2**63 - 1}, "train/step_seconds": 2.0}}',
    f'{{"time": 1.0, "step": 9, "train/loss": {10**40}}}',
]
BAD_EVENTS = [
    *BAD_RECORDS,
    '{"event": "checkpoint_failed", "time": 1.0}',
    '{"event": "checkpoint_failed", "time": 1.0, "step": [], "reason": {}}',
    f'{{"event": "checkpoint_failed", "time": 1.0, "step": 3, "reason": "{MARKUP}"}}',
    f'{{"event": "network_built", "time": 1.0, "attention": "{MARKUP}"}}',
    '{"event": "network_built", "time": 1.0, "attention": 7}',
    '{"event": "mirror_failed", "time": 1.0}',
    '{"event": "continued", "time": "x", "lost_s": "y"}',
    '{"event": "continued", "time": 1.0, "lost_s": 1e400}',
    '{"event": "attempt_started"}',
    '{"event": "update_skipped", "step": 1e400}',
    '{"event": "update_skipped", "step": 9, "reason": null}',
    '{"event": ["update_skipped"]}',
    '{"event": {"requeued": "requeued"}}',
]
JOB = {"executor": "local", "job_id": "1", "host": "h", "pid": 1, "process": "x", "submitted_at": 1.0}
BAD_JOBS = [
    *BAD_RECORDS,
    *(
        json.dumps({**JOB, "submission": 1, "run_inode": 1, **change})
        for change in (
            {"submission": "one"},
            {"submission": -1},
            {"submission": 10**400},
            {"pid": -1},
            {"pid": 2**40},
            {"job_id": "--all"},
            {"job_id": ["7"]},
            {"executor": None},
            {"submitted_at": float("nan")},
            {"submitted_at": "x"},
        )
    ),
    json.dumps({**JOB, "submission": 1}).replace("1.0", "1e400"),
]


def shown(*runs: RunDir) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(runs))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    text.encode()  # no surrogates
    assert "\x1b" not in text
    return text


@pytest.fixture
def good(run: RunDir, tmp_path: Path) -> RunDir:
    """A run beside `run` that is as it should be."""
    other = RunDir(tmp_path / "good")
    other.path.mkdir()
    other.config.write_bytes(run.config.read_bytes())
    record_step(other, 7)
    return other


def test_no_content_of_a_file_hides_another_run(run: RunDir, good: RunDir) -> None:
    give_job(run, alive=True)
    record_step(run, 5)
    record_event(run.events, Event.ATTEMPT_STARTED, attempt=1, world_size=1)
    bad = {
        run.config: [*BAD_RECORDS, '{"name": 1}', f'{{"name": "{MARKUP}", "seed": {10**40}}}'],
        run.metrics: BAD_METRICS,
        run.events: BAD_EVENTS,
        run.stop: ["", DEEP, "[]"],
        run.job: BAD_JOBS,
        run.submission(1).outcome: [*BAD_RECORDS, '{"exit_code": 7, "cause": 1, "attempt": "x"}'],
    }
    for path, contents in bad.items():
        if path == run.submission(1).outcome:
            end_job(run, 0, "done")
        before = path.read_bytes() if path.exists() else None
        for content in contents:
            path.write_text(content + "\n")
            found, other = statuses([run, good])
            case = (path.name, content[:80])
            assert (other.state, other.step, other.loss) == ("created", 7, 8.3), case
            json.dumps(found.as_json(), allow_nan=False)
            is_line = path in (run.metrics, run.events, run.stop)
            assert not re.match(r"\w+Error: ", found.reason or ""), (case, found.reason)  # a fault of ours
            assert not is_line or found.state != UNREADABLE, (case, found.reason)
            assert "7/20" in shown(run, good), case
        path.unlink()
        os.mkfifo(path)
        assert [row.state for row in statuses([run, good])] != [], path.name  # it returns
        path.unlink()
        path.mkdir()
        assert statuses([run, good])[1].state == "created", path.name
        path.rmdir()
        if before is not None:
            path.write_bytes(before)


def test_a_bad_line_leaves_the_numbers_of_the_good_ones(run: RunDir) -> None:
    give_job(run, alive=True)
    record_step(run, 5, **{"val/loss": 7.5})
    with run.metrics.open("a") as metrics, run.events.open("a") as events:
        metrics.write("".join(f"{line}\n" for line in BAD_METRICS if '"step": 9' not in line))
        events.write("".join(f"{line}\n" for line in BAD_EVENTS))
    found = status(run)
    assert (found.state, found.step, found.loss, found.val_loss) == ("running", 5, 8.5, 7.5)


def test_names_and_reasons_are_shown_as_they_are(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "[bold]x[nothing] :smile:\udcff\x1b")
    run.path.rename(other.path)
    give_job(other, alive=True)
    record_event(other.events, Event.CHECKPOINT_FAILED, step=3, reason="[/red] no space")
    text = shown(other)
    assert "[bold]x[nothing] :smile:\\udcff\\x1b  running" in text
    assert "[bold]x[nothing] :smile:\\udcff\\x1b: the checkpoint of step 3 was not saved: [/red] no" in text


def test_a_clock_that_was_set_back_shows_no_negative_times(run: RunDir) -> None:
    give_job(run, alive=True)
    run.metrics.write_text('{"time": 9e10, "step": 5, "train/step_seconds": -3.0}\n')
    for attempt in (1, 2):
        record_event(run.events, Event.ATTEMPT_STARTED, attempt=attempt, world_size=1)
    record_event(run.events, Event.CONTINUED, step=4, lost_s=-4_000_000.0)
    found = status(run)
    assert (found.restarts, found.lost_s, found.eta_s) == (1, 0.0, None)
    assert "0:00 ago" in shown(run)


def test_updates_left_out_are_shown(run: RunDir) -> None:
    give_job(run, alive=True)
    for step in (2, 3, 3, 19):  # the last one is of a course that was left
        record_event(run.events, Event.UPDATE_SKIPPED, step=step, reason="non-finite gradient")
    record_step(run, 12)
    assert (status(run).updates_left_out, status(run).left_out_in_a_row) == (2, 0)
    assert "2 updates left out, because the gradient was not finite" in shown(run)
    for step in range(4, 13):
        record_event(run.events, Event.UPDATE_SKIPPED, step=step, reason="non-finite gradient")
    assert status(run).left_out_in_a_row == 11
    assert "the last 11 updates did not change the weights" in shown(run)


def test_a_pause_is_neither_a_restart_nor_lost_time(run: RunDir) -> None:
    give_job(run, alive=True)
    events = (
        (Event.ATTEMPT_STARTED, {"attempt": 1, "world_size": 1}),
        (Event.STOPPED, {"step": 5}),
        (Event.SUBMITTED, {"reason": "resume"}),
        (Event.ATTEMPT_STARTED, {"attempt": 2, "world_size": 1}),
        (Event.CONTINUED, {"step": 5, "lost_s": 172_800.0, "repeated_s": 0.0}),
    )
    for event, fields in events:
        record_event(run.events, event, **fields)
    assert (status(run).restarts, status(run).lost_s) == (0, 0.0)


def test_a_private_folder_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        runs.chmod(0o755)  # pytest's own folders are private
        (runs / "private").mkdir(mode=0)
        (runs / "no-run").mkdir()
        (runs / "open").mkdir()
        (runs / "open" / "config.json").write_text("{}")
        monkeypatch.setenv("OUTLAST_RUNS", folder)
        with without_privileges():
            found = statuses(list_runs())
        assert [(Path(row.run_dir).name, row.state) for row in found] == [
            ("open", UNREADABLE),
            ("private", UNREADABLE),
        ]
        assert "Permission denied" in (found[1].reason or "")


def test_a_sweep_is_one_row(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = RunDir(tmp_path / "runs" / "sweep-0001")
    points = [RunDir(sweep.path / f"000{number}_seed={number}") for number in (1, 2, 3)]
    for number, point in enumerate(points):
        point.path.mkdir(parents=True)
        point.config.write_bytes(run.config.read_bytes())
        record_step(point, 5 + number, **{"val/loss": 7.0 - number})
    points[2].config.write_text("{")
    write_json(
        sweep.sweep, {"points": [{"folder": point.path.name, "fields": {"seed": 1}} for point in points]}
    )
    monkeypatch.setenv("OUTLAST_RUNS", str(sweep.path.parent))
    [row] = statuses(list_runs())
    assert (row.state, row.reason) == ("sweep", "2 created, 1 unreadable")
    assert (row.step, row.total_steps, row.val_loss) == (11, 40, 6.0)
    assert "sweep-0001  sweep" in shown(*list_runs())
    status_command.main([str(sweep.path), "--json"], standalone_mode=False)
    assert [Path(each["run_dir"]).name for each in json.loads(capsys.readouterr().out)] == [
        point.path.name for point in points
    ]
    sweep.sweep.write_text('{"points": [{"folder": "../../run", "fields": {}}]}')
    [row] = statuses(list_runs())
    assert row.state == UNREADABLE
    commit(run, 4)  # the run beside the folder is as before
    assert status(run).checkpoint_step == 4
