"""MLflow's SQLite file: created once, by whoever is first, and never half."""

import multiprocessing
import os
from pathlib import Path

from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from gpt.run.run_dir import mlflow_database_in
from gpt.sidecars.mlflow_names import mlflow_name
from gpt.sidecars.mlflow_store import experiment_id, open_client


def open_store(path: Path) -> None:
    client = open_client(f"sqlite:///{path}")
    experiment_id(client, "outlast", f"sqlite:///{path}")


def test_first_runs_of_a_folder_together_make_one_working_database(tmp_path: Path) -> None:
    """A process that was killed while it created the database does not matter either."""
    path = mlflow_database_in(tmp_path / "runs")
    path.parent.mkdir()
    path.touch()
    left = path.with_name(f".{path.name}.new-1234")
    left.touch()
    os.utime(left, (0, 0))
    context = multiprocessing.get_context("fork")  # MLflow is already loaded here
    processes = [context.Process(target=open_store, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    names = [experiment.name for experiment in MlflowClient(f"sqlite:///{path}").search_experiments()]
    assert sorted(names) == ["Default", "outlast"]


def test_every_name_is_accepted_and_stays_different() -> None:
    sources = [
        "",
        ".",
        "..",
        "...",
        "a",
        "a+b",
        "a:2b:b",
        "a:b",
        "a::b",
        "a//b",
        "a/./b",
        "a/../b",
        "/a",
        "a/",
    ]
    sources += [
        "code-c++",
        "a(b)",
        "web@en",
        "a,b",
        "a=b",
        "a\nb",
        "é",
        "e\u0301",
        "日本",
        "\udcff",
        "a b",
        " ",
    ]
    sources += ["x" * 250, "x" * 251, "x" * 252, "+" * 60, "+" * 61, "+" * 400, "x" * 231 + "++++"]
    names = [mlflow_name(source) for source in sources]
    assert len(set(names)) == len(sources)
    for name in names:
        _validate_metric_name(name)
        assert 0 < len(name) <= 250
    assert mlflow_name("train/tokens_per_second") == "train/tokens_per_second"
    for shortened in names:
        assert mlflow_name(shortened) != shortened or ":" not in shortened
