"""The record: whole lines, each once, whatever tore it."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.json_file import read_json


def steps(path: Path) -> list[int]:
    return [line["step"] for line in record.read(path)]


def test_torn_line_is_ended_before_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record.append(path, step=1)
    with path.open("a") as file:
        file.write('{"step": 2, "train/l')
    record.append(path, step=3)
    assert steps(path) == [1, 3]


def test_full_disk_raises_for_a_line_but_not_for_an_event() -> None:
    with pytest.raises(OSError, match="No space left"):
        record.append(Path("/dev/full"), step=1)
    record_event(Path("/dev/full"), Event("phase"), name="x")  # an event never ends training


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record.append(path, step=1, loss=float("nan"), norm=float("inf"), lr=0.5)
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["norm"], line["lr"]) == (None, None, 0.5)


def test_fields_can_be_added_to_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        record.append(path, step=step, loss=0.5)
    before = record.last(path)
    assert before is not None
    record.amend_last(path, **{"val/loss": float("inf"), "val/perplexity": 2.0})
    assert steps(path) == [1, 2]
    assert record.last(path) == {**before, "val/loss": None, "val/perplexity": 2.0}


def test_cut_back_keeps_the_earlier_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 9):
        record.append(path, step=step)
    with path.open("a") as file:
        file.write('{"step": 9')
    assert record.cut_back(path, 5) is None
    assert steps(path) == [1, 2, 3, 4, 5]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ([1, 2, 5, 6], "step 5 follows step 2"),
        ([1, 2, 2, 3, 4, 5, 6], "step 2 follows step 2"),
        ([1, 2, 3], "it ends at step 3, the run continues from step 6"),
    ],
)
def test_missing_or_repeated_step_is_reported(tmp_path: Path, written: list[int], complaint: str) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in written:
        record.append(path, step=step)
    assert record.cut_back(path, 6) == complaint


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\x01"])
def test_garbled_json_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"job\.json"):
        read_json(path)
    assert read_json(tmp_path / "absent.json") is None
