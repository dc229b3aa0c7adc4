"""Stop requests: every signal that asks for one sets a flag, and nothing else."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt.run.stop import STOP_SIGNALS, StopFlag


@pytest.fixture
def request_() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopFlag()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_first_signal_is_the_reason_of_the_stop(request_: StopFlag, name: str) -> None:
    assert not request_.is_requested()
    signal.raise_signal(signal.Signals[name])
    assert request_.is_requested()
    signal.raise_signal(signal.SIGTERM)  # again, and another: idempotent
    assert request_.reason == name


@pytest.mark.parametrize(
    ("content", "reason"),
    [(json.dumps({"reason": "outlast stop"}), "outlast stop"), ("", "stop file"), ("[1]", "stop file")],
)
def test_stop_file_is_polled(
    request_: StopFlag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    now = [100.0]
    monkeypatch.setattr("gpt.run.stop.time.monotonic", lambda: now[0])
    request_.watch(tmp_path / "stop")
    assert not request_.is_requested()
    (tmp_path / "stop").write_text(content)
    assert not request_.is_requested()  # the file may lie on a shared file system: not at every step
    now[0] += 0.5
    assert request_.is_requested()
    assert request_.reason == reason
