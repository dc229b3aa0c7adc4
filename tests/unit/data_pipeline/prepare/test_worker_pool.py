import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.encode import EncodeSettings
from data_pipeline.prepare.split import split_into_chunks
from data_pipeline.prepare.worker_pool import encode_all
from data_pipeline.sources.files import find_files
from data_pipeline.tokenizer.encoding import load_encoding


def test_a_killed_worker_ends_the_preparation_with_an_error(raw: Path, tmp_path: Path) -> None:
    encoding = tmp_path / "encoding.json"
    encoding.write_bytes(load_encoding("outlast-4k").to_json())
    settings = EncodeSettings(encoding, "auto", "uint16", "text", 0.1, 0, 10_000)
    (tmp_path / "work").mkdir()
    work = encode_all(tmp_path / "work", split_into_chunks(find_files([raw])[0], 10_000), settings, workers=2)
    next(work)
    victim, _ = (process.pid for process in multiprocessing.active_children())
    os.kill(victim or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process ended with exit code -9 .* run again to continue"):
        list(work)


def test_an_exception_in_a_worker_is_raised_with_its_traceback(raw: Path, tmp_path: Path) -> None:
    settings = EncodeSettings(tmp_path / "no-encoding.json", "auto", "uint16", "text", 0.1, 0, 10_000)
    found = split_into_chunks(find_files([raw])[0], 10_000)
    with pytest.raises(ConfigError, match="neither a file nor a known encoding") as error:
        list(encode_all(tmp_path, found, settings, workers=2))
    assert any("_serve" in note for note in error.value.__notes__)
