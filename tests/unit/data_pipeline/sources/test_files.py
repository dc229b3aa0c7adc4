from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.sources.files import find_files


def test_files_of_folders_and_globs_come_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a/3.jsonl.gz", "b/.hidden.txt", "b/.git/x.txt", "b/notes.pdf"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files, ignored = find_files([tmp_path / "raw"])
    assert [file.name for file in files] == ["raw/a/3.jsonl.gz", "raw/b/1.txt", "raw/b/2.jsonl"]
    assert ignored == 1
    files, ignored = find_files([str(tmp_path / "raw/*/*.jsonl*")])
    assert [file.name for file in files] == ["a/3.jsonl.gz", "b/2.jsonl"]
    assert ignored == 0


def test_every_source_without_a_supported_file_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    sources = ["missing.jsonl", "notes.pdf", "empty", "*.parquet", "a.txt", "./a.txt"]
    with pytest.raises(ConfigError) as error:
        find_files([str(tmp_path / source) for source in sources])
    assert [problem.removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        "missing.jsonl: no such file or folder",
        "notes.pdf: this kind of file is not supported "
        "(supported: .jsonl, .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst, .parquet)",
        "empty: the folder contains no supported file "
        "(supported: .jsonl, .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst, .parquet)",
        "*.parquet: no file matches",
        "a.txt is named by two sources; name it once",
    ]
