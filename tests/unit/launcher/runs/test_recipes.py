"""Paths in a run config are taken from the caller's directory."""

from pathlib import Path

import pytest

from launcher.runs.recipes import with_absolute_paths


@pytest.mark.parametrize(
    ("uri", "stored"),
    [
        ("sqlite:///some.db", "sqlite:///{here}/some.db"),
        ("sqlite:////data/some.db", "sqlite:////data/some.db"),
        ("sqlite:///", "sqlite:///"),
        ("http://tracker:5000", "http://tracker:5000"),
        (None, None),
        (7, 7),
    ],
)
def test_an_sqlite_file_of_mlflow_is_stored_with_its_whole_path(
    uri: object, stored: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths({"tracking": {"uri": uri}})["tracking"]["uri"]
    assert found == (stored.format(here=tmp_path) if isinstance(stored, str) else stored)
