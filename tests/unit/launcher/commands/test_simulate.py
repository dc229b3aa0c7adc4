"""`outlast simulate` as its users call it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import commands

BASE = [
    "simulate",
    "tiny",
    "--cluster",
    "slurm-h100",
    "--replicas",
    "20",
    "--set",
    "batch.global_batch_tokens=4096",
]


def output(*arguments: str) -> str:
    result = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    return result.stdout


@pytest.fixture
def base(data: Path) -> list[str]:
    return [*BASE, "--set", f"data.path={data}"]


def test_table_tells_days_goodput_levers_and_scales(base: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "goodput.png"
    lines = output(*base, "--plot", str(plot)).splitlines()
    assert any(line.startswith("goodput") and "90% of the runs" in line for line in lines)
    assert any("half as many failures" in line for line in lines)
    assert any(line.split()[:1] == ["100,000"] for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_more_failures_cost_goodput_and_spare_nodes_win_some_back(base: list[str]) -> None:
    often = ["--failures-per-1000-node-days", "2000", "--queue-minutes", "240", "--json"]
    base = [*base, "--days", "30", "--set", "checkpoint.every_minutes=10"]
    calm = json.loads(output(*base, "--json"))
    failing = json.loads(output(*base, *often))
    spared = json.loads(output(*base, *often, "--spare-nodes", "4"))
    assert calm["goodput"] > spared["goodput"] > failing["goodput"]
    assert sum(failing["shares"].values()) == pytest.approx(1.0)
    assert failing["days"] > calm["days"]


def test_days_replace_the_estimate_and_a_seed_repeats_the_result(base: list[str]) -> None:
    first, second = (json.loads(output(*base, "--days", "3", "--json")) for _ in range(2))
    assert first == second
    assert first["scenario"]["work_s"] == 3 * 86400


def test_unknown_accelerator_asks_for_days(base: list[str]) -> None:
    arguments = [word if word != "slurm-h100" else "local" for word in base]
    result = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert "give --days" in str(result.exception)
