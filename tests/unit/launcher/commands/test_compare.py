"""`outlast compare`, `outlast recipes` and `outlast init`."""

import json
import tomllib
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from gpt.run import record
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from launcher.commands.compare import compare_runs, shared_losses
from launcher.commands.recipes import list_recipes, print_recipe
from launcher.preflight.check import examine
from launcher.runs.recipes import recipe_names, run_tables
from tests.unit.launcher.commands.support import record_step


def test_two_runs_are_compared_by_config_and_loss(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    config = read_json(run.config) or {}
    write_json(other.config, {**config, "optimizer": {**config["optimizer"], "peak_lr": 0.5}})
    for one in (run, other):
        for step in (1, 2, 3):
            record_step(one, step, **({"val/loss": 7.5} if step == 2 else {}))
    record.append(run.metrics, step=4, **{"train/loss": float("nan")})
    record.append(other.metrics, step=4, **{"train/loss": 1.0})
    assert compare_runs(str(run.path), str(other.path), as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"optimizer.peak_lr: {config['optimizer']['peak_lr']} → 0.5"
    assert lines[-1].split() == ["4", "–", "1.0000", "–", "–"]
    assert lines[-3].split() == ["2", "8.8000", "8.8000", "7.5000", "7.5000"]
    assert compare_runs(str(run.path), str(run.path), as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["config"] == {}


def test_long_runs_are_compared_at_a_few_steps() -> None:
    lines = {step: {"train/loss": 1.0} for step in range(1, 1001)}
    steps = [row["step"] for row in shared_losses(lines, lines)]
    assert len(steps) == 10
    assert steps[-1] == 1000
    assert shared_losses(lines, {}) == []


def test_a_recipe_is_a_file_to_begin_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in recipe_names():
        assert print_recipe(name) == 0
        assert "path" in tomllib.loads(capsys.readouterr().out)["data"]
    assert print_recipe("tiny") == 0
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    tables, source = run_tables(str(tmp_path / "my.toml"), [f"data.path={data}"])
    assert examine(tables, source, "local", None).config.name == "tiny"
    with pytest.raises(ConfigError, match="lama-1b is not a recipe; did you mean 'llama-1b'"):
        print_recipe("lama-1b")


def test_recipes_are_listed_with_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_recipes() == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == recipe_names()
    assert next(row[1] for row in rows if row[0] == "llama-1b") == "1,235,814,400"
