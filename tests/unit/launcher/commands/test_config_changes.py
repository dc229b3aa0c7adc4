"""What may change on resume, and what needs `--allow-change`."""

from pathlib import Path

import pytest

from data_pipeline.config_file import field_names, validate
from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import read_index
from gpt.config.resume_rules import RULES, config_fingerprint, rule_of
from gpt.config.run import RunConfig
from launcher.commands.config_changes import check_changes, fingerprint_changes
from tests.unit.gpt.checkpoint.support import write_checkpoint


def test_free_fields_change_silently_and_others_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    check_changes({"checkpoint.every_steps": [500, 100], "data.path": ["/a", "/b"], "zero.stage": [1, 3]}, [])
    assert capsys.readouterr().err == ""
    check_changes({"schedule.total_steps": [20, 40]}, [])
    assert "warning: schedule.total_steps changes from 20 to 40" in capsys.readouterr().err


def test_a_field_that_must_match_changes_only_when_it_is_allowed_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"optimizer.peak_lr": [0.1, 0.2], "seed": [1, 2]}
    with pytest.raises(ConfigError) as error:
        check_changes(changes, ["optimizer.peak_lr"])
    (problem,) = error.value.problems
    assert problem.startswith("seed cannot change in the middle of a run: 1 → 2.")
    assert problem.endswith("allow the change with --allow-change seed.")
    check_changes(changes, ["optimizer", "seed"])
    assert "warning: optimizer.peak_lr changes from 0.1 to 0.2" in capsys.readouterr().err


def test_allowing_a_field_that_does_not_change_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"--allow-change sed: this field does not change\. Changed fields: seed"
    ):
        check_changes({"seed": [1, 2]}, ["seed", "sed"])


def run_config(**fields: object) -> RunConfig:
    tables = {"name": "x", "data": {"path": "/nowhere"}, "schedule": {"total_steps": 3}}
    return validate(RunConfig, {**tables, **fields}, "test")


def test_other_data_must_be_allowed_by_name(tmp_path: Path) -> None:
    config = run_config()
    index = read_index(write_checkpoint(tmp_path))  # trained on data "d" under config "c"
    assert fingerprint_changes(index, config, "d", {"c"}) == {}
    assert fingerprint_changes(None, config, "e", {"f"}) == {}
    change = fingerprint_changes(index, config, "e", {"c"})
    with pytest.raises(ConfigError, match="data cannot change in the middle of a run: d → e"):
        check_changes(change, [])
    check_changes(change, ["data"])
    with pytest.raises(ConfigError, match=r"data\.document_mask cannot change"):  # the data, not its table
        check_changes({**change, "data.document_mask": [True, False]}, ["data"])
    accepting = config.model_copy(update={"data": config.data.model_copy(update={"changed_from": ("d",)})})
    assert fingerprint_changes(index, accepting, "e", {"c"}) == {}


def test_a_checkpoint_of_a_foreign_config_is_refused(tmp_path: Path) -> None:
    index = read_index(write_checkpoint(tmp_path))
    change = fingerprint_changes(index, run_config(), "d", {"b", "a"})
    with pytest.raises(ConfigError, match=r"saved under another config \(c\) than the run's own \(a or b\)"):
        check_changes(change, [])
    check_changes(change, ["config"])


def test_every_field_has_a_rule_and_every_rule_has_a_field() -> None:
    names = list(field_names(RunConfig))
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    assert {rule_of(name) for name in leaves} == set(RULES)


def test_the_config_fingerprint_depends_only_on_fields_that_must_match() -> None:
    plain = config_fingerprint(run_config())
    free = run_config(checkpoint={"every_steps": 7}, schedule={"total_steps": 9}, zero={"stage": 3})
    assert config_fingerprint(free) == plain
    assert config_fingerprint(run_config(seed=1234)) == plain  # the default, given
    assert config_fingerprint(run_config(seed=7)) != plain
    sources = [{"path": path, "weight": 1.0} for path in "ab"]
    mixed = config_fingerprint(run_config(data={"mixture": sources}))
    moved = [{**source, "path": f"/elsewhere/{source['path']}"} for source in sources]
    assert config_fingerprint(run_config(data={"mixture": moved})) == mixed
    weighed = [{**sources[0], "weight": 2.0}, sources[1]]
    assert config_fingerprint(run_config(data={"mixture": weighed})) != mixed
