"""What `outlast plan` prints."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError
from launcher.commands.plan import print_plan, show_plan
from launcher.preflight.check import examine
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
