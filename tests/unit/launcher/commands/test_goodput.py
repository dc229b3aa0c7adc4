"""`outlast goodput` as its users call it."""

import json
import time

from click.testing import CliRunner

from gpt.run.events import Event, record_event
from gpt.run.record import append
from gpt.run.run_dir import RunDir
from launcher.cli import commands


def output(run: RunDir, *arguments: str) -> str:
    result = CliRunner().invoke(commands, ["goodput", str(run.path), *arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.stdout


def train(run: RunDir) -> None:
    record_event(run.events, Event.SUBMITTED)
    for attempt in (1, 2):
        record_event(run.events, Event.ATTEMPT_STARTED, attempt=attempt, world_size=2)
        record_event(run.events, Event.PHASE, name="load", seconds=0.0)
        record_event(run.events, Event.PHASE, name="first_step", seconds=0.0)
        time.sleep(0.2)
        append(run.metrics, step=attempt, **{"train/step_seconds": 0.2})
    record_event(run.events, Event.FINISHED, attempt=2, exit_code=0, cause="all steps are done")


def test_table_names_the_shares_the_attempts_and_the_failures(run: RunDir) -> None:
    train(run)
    text = output(run)
    assert text.startswith("goodput ")
    assert "training steps" in text
    assert "finished: all steps are done" in text
    assert "failures: 1" in text


def test_json_adds_up(run: RunDir) -> None:
    train(run)
    found = json.loads(output(run, "--json"))
    assert abs(sum(found["seconds"].values()) - found["wall_s"]) < 0.01
    assert 0.5 < found["goodput"] <= 1.0
    assert [attempt["how"] for attempt in found["attempts"]] == ["killed", "finished"]


def test_a_run_that_was_never_submitted_says_so(run: RunDir) -> None:
    run.events.unlink(missing_ok=True)
    assert output(run) == ""
    assert json.loads(output(run, "--json")) is None
