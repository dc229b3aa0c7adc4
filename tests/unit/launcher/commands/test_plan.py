"""What `outlast plan` prints."""

from pathlib import Path

import pytest

from launcher.commands.plan import show_plan
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
