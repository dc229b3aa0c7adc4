import os
from pathlib import Path

import pytest

from data_pipeline.durable import rename_durably, write_durably


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fsyncs and renames of the test, in order: `fsync NAME` and `rename NAME`."""
    calls: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(target).name}")
        rename(source, target)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    return calls


def test_a_durable_write_syncs_the_file_then_renames_it_then_syncs_the_folder(
    tmp_path: Path, calls: list[str]
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert calls == [f"fsync .a.{os.getpid()}", "rename a", f"fsync {tmp_path.name}"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_rename_syncs_the_folder_of_the_new_name(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a").write_bytes(b"content")
    rename_durably(tmp_path / "work" / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert calls == ["rename b", f"fsync {tmp_path.name}"]
