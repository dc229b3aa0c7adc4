"""The record: whole lines, each once, whatever tore it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from gpt.run import record
from gpt.run.events import Event, earlier_config_fingerprints, read_events, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Result


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


# Complete lines that are no lines of metrics.jsonl.
BAD_LINES = [
    "{}",
    "[1]",
    "null",
    '{"time": 1.0}',
    *(
        f'{{"time": 1.0, "step": {step}}}'
        for step in ("null", '"abc"', "1e400", "NaN", "-1", "true", "1.0", 10**30)
    ),
    *(f'{{"time": {time}, "step": 3}}' for time in ('"x"', "null", "1e400", "-1e400", "1e300", "[]")),
    '{"time": 1.0, "step": ' + "[" * 100_000,
    '{"time": 1.0, "step": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"time": 1.0, "step": ' + "9" * 5000 + "}",
    "\x00\x01",
    '{"time": 1.0, "step": 3} {"time": 1.0, "step": 3}',
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:40])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_line_costs_none_of_the_others(tmp_path: Path, bad: str, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        record.append(path, step=step, **{"val/loss": step / 2})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:place], bad, *lines[place:]]) + "\n")
    assert [line["step"] for line in record.read_steps(path)] == [1, 2, 3, 4]
    newest = record.last(path)
    assert newest is not None
    assert newest["step"] == 4
    assert record.val_losses(path) == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    record.cut_back(path, 3)
    assert [line["step"] for line in record.read_steps(path)] == [1, 2, 3]
    record.append(path, step=4)
    record.amend_last(path, **{"val/loss": 2.5})
    assert record.val_losses(path)[4] == 2.5


def test_only_finite_numbers_are_handed_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"time": 1, "step": 2, "a": 1e400, "b": NaN, "c": "x", "d": [1], "e": null, "f": true, "g": 2.5, '
        f'"h": {10**30}, "i": -3}}\n'
    )
    [line] = record.read_steps(path)
    assert line == {"time": 1, "step": 2, "b": None, "e": None, "g": 2.5, "i": -3}


def test_a_line_of_a_later_step_in_the_middle_does_not_end_the_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 9, 3, 4, 5, 6):
        record.append(path, step=step)
    before = path.stat().st_size
    end = sum(map(len, path.read_bytes().splitlines(keepends=True)[:3]))
    assert record.cut_back(path, 6) == f"the line before byte {end} is of a later step"
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert path.stat().st_size == before


def test_the_last_line_is_found_before_a_long_stretch_of_garbage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record.append(path, step=1)
    with path.open("a") as file:
        file.write("garbage\n" * 20_000)
    newest = record.last(path)
    assert newest is not None
    assert newest["step"] == 1


def test_a_name_that_is_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    record_event(events, Event("mirror_failed"), reason="no such folder: \udcff")
    [event] = read_events(events)
    assert event["reason"] == "no such folder: \udcff"
    write_json(tmp_path / "x.json", {"path": "\udcff"})
    assert read_json(tmp_path / "x.json") == {"path": "\udcff"}
    assert Result(exit_code=ExitCode.FAILED, cause="\udcff").cause == "\\udcff"


@pytest.mark.parametrize(
    "bad",
    [
        "{}",
        '{"event": null}',
        '{"event": 3, "step": 1}',
        '{"event": ["checkpoint_saved"], "step": 1}',
        '{"event": "checkpoint_saved"}',
        '{"event": "checkpoint_saved", "step": "x"}',
        '{"event": "checkpoint_saved", "step": 1e400}',
        '{"event": "update_skipped", "step": 4, "reason": 7}',
        '{"event": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
    ],
    ids=lambda line: line[:40],
)
def test_a_bad_event_costs_none_of_the_others(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "events.jsonl"
    record_event(path, Event("resumed"), step=1)
    with path.open("a") as file:
        file.write(f"{bad}\n")
    record_event(path, Event("config_changed"), config_fingerprint=["no", "text"])
    record_event(path, Event("finished"), step=None, cause="done")
    assert [event["event"] for event in read_events(path)] == ["resumed", "config_changed", "finished"]
    assert earlier_config_fingerprints(path) == set()


@pytest.mark.parametrize("read", [record.read, read_json, record.last, record.val_losses, record.cut_back])
def test_a_fifo_is_refused_instead_of_waited_for(tmp_path: Path, read: Callable[..., Any]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    arguments = (path, 1) if read is record.cut_back else (path,)
    with pytest.raises(ConfigError, match="fifo is not a regular file"):
        list(read(*arguments) or ())


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\x01", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_garbled_json_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"job\.json"):
        read_json(path)
    assert read_json(tmp_path / "absent.json") is None
