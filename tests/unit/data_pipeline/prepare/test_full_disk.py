"""Preparing onto a full disk: a tmpfs of a few pages, which is enlarged later (needs root)."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.dataset.integrity import verify
from data_pipeline.errors import DataError
from data_pipeline.prepare.pipeline import prepare
from tests.unit.data_pipeline.support import config, files_of, packaged_texts, write_jsonl

SETTINGS = {"shard_tokens": 10_000, "val_fraction": 0.1, "deduplicate": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = packaged_texts()
    return write_jsonl(tmp_path_factory.mktemp("raw") / "a.jsonl", [*texts[:200], *texts[100:300]])


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "data"
    prepare(config(out, source, **SETTINGS))
    return files_of(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; `_resize` sets its size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def _resize(disk: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", disk], check=True)


@pytest.mark.parametrize(("share", "workers"), [(0.0, 1), (0.4, 1), (0.4, 2), (0.8, 1)])
def test_a_preparation_continues_after_a_full_disk_with_the_same_bytes(
    source: Path, uninterrupted: dict[str, bytes], disk: Path, share: float, workers: int
) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    whole = sum(-(-len(content) // page) * page for content in uninterrupted.values())
    _resize(disk, max(page, int(share * whole)))
    out = disk / "data"
    settings = config(out, source, **SETTINGS, workers=workers)
    for _ in range(2):  # a second run without space ends in the same way
        with pytest.raises(
            DataError, match=r"stopped: .*No space left on device.*Finished work is kept; run"
        ):
            prepare(settings)
        assert not [path.name for path in out.glob("*") if path.name != ".prepare"]
    _resize(disk, 4 * whole)
    prepare(settings)
    assert files_of(out) == uninterrupted
    assert list(verify(out)) == []
