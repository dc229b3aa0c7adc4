"""Reading what is appended to the record: each line once, whatever happens to the file in between."""

import time
from pathlib import Path

import pytest

from gpt.run import record
from gpt.run.line_reader import LineReader


def new(reader: LineReader) -> list[int]:
    """The steps of the lines that are new."""
    steps = [line["step"] for line in reader.unread()]
    reader.mark_read()
    return steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, *steps: int) -> None:
    for step in steps:
        record.append(path, step=step, **{"train/loss": 1.0})


def test_lines_come_once_they_are_complete_and_once_only(path: Path) -> None:
    reader = LineReader(path, record.checked_step)
    assert new(reader) == []  # there is no file yet
    append(path, 1, 2)
    with path.open("a") as file:
        file.write('{"time": 1.0, "step": 3')
    assert new(reader) == [1, 2]
    assert new(reader) == []
    with path.open("a") as file:
        file.write("}\n")
    assert new(reader) == [3]


def test_lines_come_again_until_they_are_marked_as_read(path: Path) -> None:
    reader = LineReader(path, record.checked_step)
    append(path, 1, 2, 3)
    assert [line["step"] for line in reader.unread()] == [1, 2, 3]
    first = next(iter(reader.unread()))
    reader.mark_read()  # only what was handed out since the last call counts
    assert first["step"] == 1
    assert new(reader) == [2, 3]


def test_a_reader_continues_at_the_first_line_that_changed(path: Path) -> None:
    reader = LineReader(path, record.checked_step)
    append(path, *range(1, 51))
    assert len(new(reader)) == 50
    record.cut_back(path, 20)
    append(path, *range(21, 91))  # the file is longer than before when the reader looks again
    assert new(reader) == list(range(21, 91))
    record.amend_last(path, **{"val/loss": 2.0})
    [line] = reader.unread()
    assert (line["step"], line["val/loss"]) == (90, 2.0)
    path.unlink()
    append(path, 1)
    assert new(reader) == [1]


def test_a_reader_from_the_end_passes_over_what_was_there(path: Path) -> None:
    append(path, 1, 2)
    reader = LineReader(path, record.checked_step, from_end=True)
    append(path, 3)
    assert new(reader) == [3]
    record.cut_back(path, 1)
    append(path, 2)
    assert new(reader) == [2]


def test_a_line_that_is_too_long_is_passed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.run.line_reader.LONGEST_LINE_BYTES", 100)
    append(path, 1)
    with path.open("a") as file:
        file.write('{"time": 1.0, "step": 2, "note": "' + "x" * 350 + '"}\n')
    append(path, 3)
    reader = LineReader(path, record.checked_step)
    assert new(reader) == [1, 3]
    assert new(reader) == []
    append(path, 4)
    assert new(reader) == [4]


def test_a_poll_costs_nothing_for_the_lines_that_were_read(path: Path) -> None:
    line = b'{"time": 1.5, "step": 7, "train/loss": 2.5}\n'
    path.write_bytes(line * 20_000)
    reader = LineReader(path, record.checked_step)
    assert len(new(reader)) == 20_000
    started = time.process_time()
    for _ in range(100):
        assert new(reader) == []
    assert time.process_time() - started < 0.1
