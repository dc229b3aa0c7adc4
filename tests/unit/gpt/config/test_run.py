"""The typed ways to change a run config."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipeline.config_file import Section
from gpt.config.data import DataConfig
from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt.config.parallel import ZeroConfig
from gpt.config.run import RunConfig, Tables

CONFIG = RunConfig(name="x", data=DataConfig(path=Path("d")), schedule=ScheduleConfig(total_steps=10))


def test_every_table_can_be_replaced() -> None:
    tables = {name for name, value in dict(CONFIG).items() if isinstance(value, Section)}
    assert set(Tables.__annotations__) == tables


def test_replaced_table_is_checked_against_the_others() -> None:
    assert CONFIG.with_tables(schedule=ScheduleConfig(total_steps=20)).total_steps == 20
    with pytest.raises(ValidationError, match=r"schedule\.warmup_steps = 9 is more than"):
        CONFIG.with_tables(schedule=ScheduleConfig(total_steps=5, warmup_steps=9))
    with pytest.raises(ValidationError, match="Use 'adamw', or no offload"):
        zero = ZeroConfig(offload_optimizer="cpu")
        CONFIG.with_tables(zero=zero, optimizer=OptimizerConfig(name="muon"))


def test_accepted_data_is_added_to_the_earlier_ones() -> None:
    assert CONFIG.accepting_data("a").accepting_data("b").data.changed_from == ("a", "b")
