"""What `outlast plan` prints."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, LaunchError
from launcher.cluster import ClusterConfig
from launcher.commands.plan import print_plan, show_plan
from launcher.preflight.alternatives import gpus_for, settings
from launcher.preflight.check import examine
from launcher.preflight.plan import plan
from launcher.runs.recipes import run_tables


def test_values_are_aligned_when_the_path_of_a_source_is_long(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = f"{{path = '{data}', weight = 1}}, {{path = '{data}', weight = 3}}"
    tables, source = run_tables("tiny", [f"data.mixture=[{mixture}]"])
    show_plan(examine(tables, source, "local", None))
    rows = capsys.readouterr().out.splitlines()
    [first, second] = [row for row in rows if row.startswith("  from ")]
    start = len(f"  from {data}  ")
    assert first[:start] == second[:start] == f"  from {data}  "
    assert rows[0].startswith("parameters") and rows[0][start:] == "631,104"


@pytest.fixture
def gpus(tmp_path: Path) -> str:
    file = tmp_path / "gpus.toml"
    file.write_text('kind = "slurm"\nnodes = 2\ngpus_per_node = 2\naccelerator = "h100-80gb"\n')
    return str(file)


def test_trace_adds_a_step_that_was_run_without_gpus(
    data: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_plan("tiny", gpus, [f"data.path={data}"], as_json=True, mfu=0.4, is_traced=True) == 0
    trace = json.loads(capsys.readouterr().out)["trace"]
    assert {collective["ranks"] for collective in trace["collectives"]} == {4}
    assert trace["peak"] > trace["weights"] + trace["optimizer"] > 0
    assert trace["communication_seconds"] > 0 and trace["compute_seconds"] > 0


def test_trace_of_an_offloaded_run_is_refused(data: Path, gpus: str) -> None:
    settings = [f"data.path={data}", "zero.offload_optimizer=cpu"]
    with pytest.raises(LaunchError, match=r"zero\.offload_optimizer = 'cpu': a dry step has no host memory"):
        print_plan("tiny", gpus, settings, as_json=False, mfu=0.4, is_traced=True)


def test_a_plan_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_plan("llama-1b", "slurm-h100", [], as_json=False, mfu=0.4, price_per_gpu_hour=2.5) == 0
    rows = dict(row.split("  ", 1) for row in capsys.readouterr().out.splitlines() if "  " in row.strip())
    assert "epochs" not in rows["tokens"]
    needs = plan(examine(*run_tables("llama-1b", []), "slurm-h100", None).config, H100, None)
    assert needs.gpu_hours is not None
    assert rows["cost"].strip() == f"{2.5 * needs.gpu_hours:,.0f}"
    assert rows["memory per rank: peak"].endswith(" (before the gradients: less than the sum)")
    assert print_plan("tiny", "local", [], as_json=True, mfu=0.4, tokens=5120) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["epochs"] == 4.0
    assert [other["is_own"] for other in content["settings"]].count(True) == 1
    assert "model.vocab_size is not set; the plan assumes 50257 token ids" in printed.err


H100 = ClusterConfig(kind="slurm", nodes=4, gpus_per_node=8, accelerator="h100-80gb")


def test_the_gpus_for_a_number_of_days_are_whole_nodes_that_divide_the_batch() -> None:
    config = examine(*run_tables("llama-1b", []), "slurm-h100", None).config
    hours = plan(config, H100, None).gpu_hours or 0.0
    count = gpus_for(14, config, H100, 0.4)
    assert (count.gpus, count.nodes) == (32, 4)  # 3 nodes would do, but 24 GPUs do not divide 256 sequences
    assert hours / 24 / 14 <= 24
    assert count.days == hours / 24 / 32
    with pytest.raises(ConfigError, match=r"--days needs a cluster file with gpus_per_node and accelerator"):
        gpus_for(14, config, ClusterConfig(kind="local"), 0.4)
    with pytest.raises(
        ConfigError, match=r"--days 0\.01: .* GPU hours need at least \d+ GPUs, and no number"
    ):
        gpus_for(0.01, config, H100, 0.4)


def test_less_memory_is_needed_at_a_higher_stage_and_with_more_recomputation() -> None:
    config = examine(*run_tables("llama-1b", []), "slurm-h100", None).config
    peaks = [setting.peak for setting in settings(config, H100)]
    for row in (peaks[:3], peaks[3:6], peaks[6:], peaks[::3]):
        assert row == sorted(row, reverse=True)
