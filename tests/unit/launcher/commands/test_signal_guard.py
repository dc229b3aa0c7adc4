"""Signals while a command follows a job."""

import os
import signal
from pathlib import Path

import pytest

from gpt.run.run_dir import RunDir
from launcher.commands.signal_guard import SignalGuard, held_signals
from launcher.runs.stop_request import pending_stop


def is_now(run: RunDir) -> bool:
    request = pending_stop(run)
    return request is not None and request.now


def test_a_later_second_ctrl_c_stops_without_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    clock = [100.0]
    monkeypatch.setattr("launcher.commands.signal_guard.time.monotonic", lambda: clock[0])
    with SignalGuard(run, lambda _text: None) as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            guard.answer()
        request = pending_stop(run)
        assert request is not None
        assert (request.reason, request.now) == ("SIGTERM", False)
        clock[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        guard.answer()
        assert is_now(run) is False
        os.kill(os.getpid(), signal.SIGINT)
        guard.answer()
        assert is_now(run) is True
        with pytest.raises(KeyboardInterrupt):  # the scheduler may be silent, so the user can leave
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_wait_until_a_submission_is_over_and_then_reach_their_handler(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with SignalGuard(run) as guard:
        with held_signals() as held:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (held, guard.has_signal) == ([signal.SIGTERM] * 2, False)
        assert guard.has_signal
        guard.answer()
    request = pending_stop(run)
    assert request is not None
    assert request.reason == "SIGTERM"
    with pytest.raises(KeyboardInterrupt), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
    with held_signals() as held:  # the block has dealt with it
        os.kill(os.getpid(), signal.SIGINT)
        held.clear()
