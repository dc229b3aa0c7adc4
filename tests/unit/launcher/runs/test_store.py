"""Run directories: how they are found, and how two configs differ."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir
from launcher.runs.store import changed_fields, make_next_run_folder, next_run_folder, open_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    write_json(run.config, {})
    return run


def test_a_run_has_one_path_however_it_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    for path in (".", f"../{run.path.name}", "checkpoints/..", str(run.path)):
        assert open_run(path).path == run.path
    link = run.path.with_name("link")
    link.symlink_to(run.checkpoints)
    assert open_run(f"{link}/..").path == run.path  # as the system reads it
    assert open_run(run.path).path.name == "run"


def test_symbolic_links_are_not_resolved(run: RunDir) -> None:
    link = run.path.with_name("link")
    link.symlink_to(run.path)
    assert open_run(link).path == link


def test_changed_fields_map_dotted_names_to_old_and_new() -> None:
    before: dict[str, Any] = {"a": 1, "b": {"c": 2, "d": [3]}, "gone": 4, "list": [{"f": 7}, {"f": 8}]}
    after: dict[str, Any] = {"a": 1, "b": {"c": 5, "d": [3]}, "new": {"e": 6}, "list": [{"f": 7}, {"f": 9}]}
    assert changed_fields(before, after) == {
        "b.c": [2, 5], "gone": [4, None], "new.e": [None, 6], "list.1.f": [8, 9]
    }  # fmt: skip


def test_two_commands_at_the_same_moment_get_two_folders(tmp_path: Path) -> None:
    (tmp_path / "a-²").mkdir()  # a digit, and no number
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_next_run_folder("a", tmp_path / "runs"), range(32)))
    assert sorted(path.name for path in made) == [f"a-{number:04d}" for number in range(1, 33)]
    assert next_run_folder("a", tmp_path) == tmp_path / "a-0001"
