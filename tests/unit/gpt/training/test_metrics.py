"""The lines of metrics.jsonl: what a step returns is what a line gets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt.distributed.world import World
from gpt.run import record
from gpt.run.run_dir import RunDir
from gpt.training.metrics import DeferredScalars, MetricsWriter
from tests.unit.gpt.saving.support import join

FIELDS = {"tokens": 256, "train/step_seconds": 0.5}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process alone."""
    yield join(tmp_path / "meeting", 0, 1)
    dist.destroy_process_group()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.attempt(1).path.mkdir(parents=True)
    return run_dir


def begin(writer: MetricsWriter, step: int, **more: float) -> None:
    numbers = {"train/loss": 12.0, "train/grad_norm": 3.0, **more}
    deferred = DeferredScalars({name: torch.tensor(value) for name, value in numbers.items()})
    writer.begin(step, dict(FIELDS), deferred, 4.0)


def lines(run_dir: RunDir) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "time"}
        for line in record.read(run_dir.metrics)
    ]


def test_line_has_every_number_that_the_step_returned(run_dir: RunDir, alone: World) -> None:
    writer = MetricsWriter(run_dir, alone, 1)
    begin(writer, 1, **{"train/anything": 7.0})
    assert writer.to_reduce(1) == {"train/loss": 12.0}
    writer.add(1, **{"data/digest": 9.0})
    writer.complete(1, {"train/loss": 20.0, "stop": 0.0})
    (line,) = lines(run_dir)
    assert line == {
        "step": 1,
        **FIELDS,
        "data/digest": 9.0,
        "train/loss": 5.0,  # the sum over the ranks, per scored token
        "train/grad_norm": 3.0,
        "train/anything": 7.0,
    }


def test_complete_line_is_written_once(run_dir: RunDir, alone: World) -> None:
    writer = MetricsWriter(run_dir, alone, 1)
    begin(writer, 1)
    writer.complete(1, {"train/loss": 20.0})
    assert writer.to_reduce(1) == {}
    writer.complete(1, {})
    assert [line["step"] for line in lines(run_dir)] == [1]


def test_superseded_attempt_writes_no_line(run_dir: RunDir, alone: World) -> None:
    writer = MetricsWriter(run_dir, alone, 1)
    begin(writer, 1)
    run_dir.attempt(2).path.mkdir()
    writer.complete(1, {"train/loss": 20.0})
    assert lines(run_dir) == []


def test_lines_that_a_full_disk_refuses_are_written_later(
    run_dir: RunDir, alone: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(run_dir, alone, 1)
    with monkeypatch.context() as patch:
        patch.setattr(record, "append", full_disk)
        begin(writer, 1)
        writer.complete(1, {"train/loss": 20.0})
    assert writer.problem == "1 lines of metrics.jsonl cannot be written"
    assert "1 lines of metrics.jsonl wait for the disk: full" in capsys.readouterr().out
    begin(writer, 2)
    writer.complete(2, {"train/loss": 20.0})
    assert writer.problem is None
    assert [line["step"] for line in lines(run_dir)] == [1, 2]


def full_disk(*_: object, **__: object) -> None:
    raise OSError("full")


def test_step_times_cover_the_steps_since_the_last_call(run_dir: RunDir, alone: World) -> None:
    writer = MetricsWriter(run_dir, alone, 1)
    for step in (1, 2):
        begin(writer, step)
        writer.complete(step, {"train/loss": 20.0})
    assert writer.step_times() == {"train/step_seconds_p50": 0.5, "train/step_seconds_p99": 0.5}
    assert writer.step_times() == {}
