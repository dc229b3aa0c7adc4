"""Two fields of which one is set."""

from gpt.config.alternatives import without_alternatives


def test_setting_one_alternative_drops_the_other() -> None:
    tables = {"schedule": {"total_tokens": 5, "warmup_steps": 1}, "data": {"mixture": [{"path": "a"}]}}
    assert without_alternatives(tables, ["schedule.total_steps", "data.path"]) == {
        "schedule": {"warmup_steps": 1},
        "data": {},
    }
    assert without_alternatives(tables, ["schedule.warmup_steps", "data.mixture.0.weight"]) == tables
    assert without_alternatives(tables, ["schedule.total_steps", "schedule.total_tokens"]) == tables
