"""The progress display."""

import io
import json
import os
import pty
import sys

import pytest
from rich.console import Console

from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.commands.progress import Display
from launcher.commands.record_follower import RecordFollower
from tests.unit.launcher.commands.support import record_step
from tests.unit.launcher.support import give_job


def test_the_display_prints_restarts_saves_and_scores_as_plain_lines(run: RunDir) -> None:
    display = Display(10)
    output = io.StringIO()
    display.console = Console(file=output, width=200)
    follower = RecordFollower(run)
    record_event(run.events, Event.WORKERS_CRASHED, times=1, node="n1", cause="ValueError: no ib9")
    record_event(run.events, Event.HANG, culprit="rank 1 on n1 is stopped")
    record_event(run.events, Event.ATTEMPT_STARTED, attempt=3, world_size=2)
    record_event(run.events, Event.CHECKPOINT_SAVED, step=4, seconds=1.25, bytes=3 << 20)
    record_event(run.events, Event.CHECKPOINT_REJECTED, path="step-8", reason="missing")
    record_event(run.events, Event.ATTEMPT_STARTED, attempt=4, world_size=2)
    record_event(run.events, Event.RESUMED, step=4)
    record_event(run.events, Event.UPDATE_SKIPPED, step=5, reason="non-finite gradient")
    record_event(run.events, Event.PHASE, name="data", seconds=1.0)
    record_step(run, 5)
    record_step(run, 6, **{"val/loss": 1.5, "val/bits_per_byte": 0.75})
    [update] = follower.updates(give_job(run, alive=False))
    display.show(update)
    assert output.getvalue().splitlines() == [
        "warning: the workers crashed before an attempt began: ValueError: no ib9",
        "warning: the workers hang: rank 1 on n1 is stopped",
        "attempt 3 started on 2 processes",
        "saved the checkpoint of step 4: 3.0 MiB in 1.2 s",
        "warning: step-8 failed verification and is not used: missing",
        "attempt 4 restarted the workers on 2 processes",
        "resumed from the checkpoint of step 4",
        "warning: step 5 did not update the weights: non-finite gradient",
        "step 6: validation loss 1.5000, 0.7500 bits per byte",
        "step 6/10  loss 8.400  100 tokens/s  0:08 left",
    ]


def test_numbers_that_are_missing_or_not_finite_are_shown_as_such(run: RunDir) -> None:
    display = Display(10)
    output = io.StringIO()
    display.console = Console(file=output, width=200)
    follower = RecordFollower(run)
    nan = float("nan")
    record_step(run, 4, **{"val/loss": nan, "val/bits_per_byte": nan})
    numbers = {"train/loss": nan, "train/tokens_per_second": nan, "train/step_seconds": nan}
    record.append(run.metrics, step=5, **numbers)
    with run.metrics.open("a") as metrics, run.events.open("a") as events:
        metrics.write('{"step": "x"}\n[]\n{"time": 1.0, "step": 12}\n')
        events.write('{"event": "checkpoint_saved"}\n{"event": "checkpoint_saved", "step": 4}\n{}\n')
        events.write(
            '{"event": "checkpoint_failed", "step": 8, "reason": "[/red] \\u001b[31m \\udcff :x:"}\n'
        )
    [update] = follower.updates(give_job(run, alive=False))
    display.show(update)
    assert output.getvalue().splitlines() == [
        "saved the checkpoint of step 4",
        "warning: saving the checkpoint of step 8 failed, training continues: [/red] \\x1b[31m \\udcff :x:",
        "step 4: validation loss not finite, not finite bits per byte",
        "step 12/10  loss not finite  not finite tokens/s  0:00 left",
    ]


@pytest.mark.parametrize("value", [None, "x", 7, -1, 1e400, [], {}, True])
def test_no_event_can_end_the_display(run: RunDir, value: object) -> None:
    """Every event of the protocol, without fields and with `value` in each field that the display reads."""
    display = Display(10)
    display.console = Console(file=io.StringIO(), width=200)
    follower = RecordFollower(run)
    fields = (
        "step",
        "reason",
        "cause",
        "path",
        "bytes",
        "seconds",
        "attempt",
        "world_size",
        "culprit",
        "name",
    )
    with run.events.open("a") as events:
        for event in Event:
            for more in ({}, dict.fromkeys(fields, value)):
                events.write(json.dumps({"event": event.value, "time": 1.0, **more}) + "\n")
    [update] = follower.updates(give_job(run, alive=False))
    display.show(update)


def test_ctrl_c_is_not_echoed_into_the_bar() -> None:
    program = """
import sys, termios
from launcher.commands.terminal import without_echo_of_control_keys
def has_echo():
    return bool(termios.tcgetattr(2)[3] & termios.ECHOCTL)
before = has_echo()
with without_echo_of_control_keys():
    during = has_echo()
sys.exit((before, during, has_echo()) != (True, False, True))
"""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    try:
        assert os.waitpid(process, 0)[1] == 0
    finally:
        os.close(terminal)
