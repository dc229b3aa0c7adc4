"""Fixtures of the commands' tests: a small data set, and a run directory on it that was never submitted."""

from pathlib import Path

import pytest

from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.preflight.check import examine
from launcher.runs.recipes import run_tables
from launcher.runs.store import create_run
from tests.unit.launcher.support import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data: Path, tmp_path: Path) -> RunDir:
    tables, source = run_tables("tiny", [f"data.path={data}"])
    request = examine(tables, source, ClusterConfig(kind="local"), tmp_path / "run")
    return create_run(tmp_path / "run", request, ["outlast"])
