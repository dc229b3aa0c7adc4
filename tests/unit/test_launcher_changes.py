"""What may change on resume: every field has a class, and who insists is heard."""

from pathlib import Path

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import read_index
from gpt.config import RunConfig
from launcher.changes import data_change, judge
from tests.unit.checkpoint_support import write_checkpoint


def test_free_fields_change_in_silence_and_others_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    judge({"checkpoint.every_steps": [500, 100], "data.path": ["/a", "/b"], "zero.stage": [1, 3]}, [])
    assert capsys.readouterr().err == ""
    judge({"schedule.total_steps": [20, 40]}, [])
    assert "warning: schedule.total_steps changes from 20 to 40" in capsys.readouterr().err


def test_a_field_that_must_match_changes_only_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"optimizer.peak_lr": [0.1, 0.2], "seed": [1, 2]}
    with pytest.raises(ConfigError) as error:
        judge(changes, ["optimizer.peak_lr"])
    (problem,) = error.value.problems
    assert problem.startswith("seed cannot change in the middle of a run: 1 → 2.")
    assert problem.endswith("insist with --allow-change seed.")
    judge(changes, ["optimizer", "seed"])
    assert "warning: optimizer.peak_lr changes from 0.1 to 0.2" in capsys.readouterr().err


def test_an_allowance_for_what_does_not_change_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--allow-change sed: that does not change; what changes: seed"):
        judge({"seed": [1, 2]}, ["seed", "sed"])


def test_other_data_is_named_and_needs_an_allowance(tmp_path: Path) -> None:
    tables = {"name": "x", "data": {"path": "/nowhere"}, "schedule": {"total_steps": 3}}
    config = validate(RunConfig, tables, "test")
    index = read_index(write_checkpoint(tmp_path))  # trained on data "d"
    assert data_change(index, config, "d") == {}
    assert data_change(None, config, "e") == {}
    change = data_change(index, config, "e")
    with pytest.raises(ConfigError, match="data cannot change in the middle of a run: d → e"):
        judge(change, [])
    judge(change, ["data"])
    with pytest.raises(ConfigError, match=r"data\.document_mask cannot change"):  # the data, not its table
        judge({**change, "data.document_mask": [True, False]}, ["data"])
    accepting = config.model_copy(update={"data": config.data.model_copy(update={"changed_from": ("d",)})})
    assert data_change(index, accepting, "e") == {}
