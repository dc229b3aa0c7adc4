"""Grids: what they may hold, and what becomes of it in each run's config."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from launcher.sweep import SweepConfig, examine_points, points_of
from tests.unit.launcher_support import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def sweep(**tables: Any) -> SweepConfig:
    return validate(SweepConfig, {"run": "tiny", **tables}, "sweep.toml")


def test_every_combination_is_a_point_with_a_name_of_its_own() -> None:
    config = sweep(grid={"optimizer": {"peak_lr": [1e-3, 3e-3]}, "seed": [1, 2, 3]})
    points = points_of(config)
    assert len(points) == len({point.name for point in points}) == 6
    assert points[0].name == "0001_peak_lr=0.001_seed=1"
    assert points[-1].fields == {"optimizer.peak_lr": 3e-3, "seed": 3}


def test_values_reach_the_config_as_they_are_also_tables(data: Path, tmp_path: Path) -> None:
    mixtures = [[{"path": str(data), "weight": weight}] for weight in (1, 2)]
    config = sweep(set={"batch": {"micro_batch": 2}}, grid={"data.mixture": mixtures})
    requests = examine_points(config, points_of(config), "local", tmp_path)
    assert [request.config.data.mixture[0].weight for request in requests] == [1, 2]
    assert {request.config.batch.micro_batch for request in requests} == {2}


def test_the_problems_of_all_points_are_told_at_once(tmp_path: Path) -> None:
    config = sweep(grid={"model.n_layer": [1], "batch.micro_batch": [0]})
    with pytest.raises(ConfigError) as error:
        examine_points(config, points_of(config), "local", tmp_path)
    assert "did you mean 'model.n_layers'?" in str(error.value)
    assert "batch.micro_batch = 0" in str(error.value)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "grid: a list of values is needed"),
        ({"seed": []}, "grid.seed: a list of values is needed"),
        ({"seed": 1}, "grid.seed: a list of values is needed"),
        ({str(i): list(range(8)) for i in range(10)}, "grid: 1073741824 combinations are more than 1000"),
    ],
)
def test_a_grid_that_is_none_is_refused(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep(grid=grid)
