"""`outlast replay` computes what a run has recorded, and finds what it has not."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from gpt.run.events import Event, record_event
from launcher.commands.replay import replay
from tests.distributed.conftest import Run, make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Run:
    """Eight steps with checkpoints at 4 and 8, of which some sequences were skipped on the way."""
    run = make_run(
        tmp_path_factory.mktemp("replay") / "run",
        data_dir,
        zero__stage=2,
        data__skip=[[20, 24]],
        precision="bf16",
    )
    assert run.train()["exit_code"] == 0
    return run


def contents(run: Run) -> dict[str, bytes]:
    files = (path for path in run.dir.path.rglob("*") if path.is_file())
    return {str(path.relative_to(run.dir.path)): path.read_bytes() for path in files}


def test_steps_are_computed_again_bit_for_bit_and_change_nothing(
    finished: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert replay(str(finished.dir.path), 6, 8, 2) == 0
    assert "steps 6 to 8: as recorded, bit for bit" in capfd.readouterr().out
    assert contents(finished) == before


def test_one_process_gives_the_same_numbers_up_to_rounding(
    finished: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert replay(str(finished.dir.path), 2, None, 1) == 0  # from the initial weights
    captured = capfd.readouterr()
    assert "computing steps 1 to 2 again in 1 process, from the initial weights" in captured.err
    assert "step 2: as recorded" in captured.out


def test_a_record_that_says_otherwise_is_found(finished: Run, capfd: pytest.CaptureFixture[str]) -> None:
    genuine = finished.dir.metrics.read_bytes()
    lines = [json.loads(line) for line in genuine.splitlines()]
    lines[5]["data/digest"] += 1
    lines[6]["train/loss"] *= 1.1
    finished.dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert replay(str(finished.dir.path), 6, 7, 2) == 1
    finally:
        finished.dir.metrics.write_bytes(genuine)
    assert "NOT as recorded; the first difference is the data of step 6" in capfd.readouterr().out


def test_what_cannot_be_computed_is_said(finished: Run) -> None:
    folder = str(finished.dir.path)
    with pytest.raises(ConfigError, match="step 9 is not in the record"):
        replay(folder, 8, 9, None)
    with pytest.raises(ConfigError, match="--to 3: it is before --step 4"):
        replay(folder, 4, 3, None)
    with pytest.raises(ConfigError, match="--processes 3: "):
        replay(folder, 4, None, 3)
    events = finished.dir.events.read_bytes()
    record_event(finished.dir.events, Event.CONFIG_CHANGED, changes={})
    try:
        with pytest.raises(ConfigError, match="was changed after this step"):
            replay(folder, 4, None, None)
    finally:
        finished.dir.events.write_bytes(events)
