"""The copy of the tokenizer in a run directory."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from gpt.run.run_dir import RunDir
from gpt.run.tokenizer import copy_encoding, run_encoding
from tests.unit.launcher.support import make_data


def test_the_tokenizer_survives_a_move_of_the_data(tmp_path: Path) -> None:
    data, run = make_data(tmp_path / "made"), RunDir(tmp_path / "run")
    run.path.mkdir()
    expected = run_encoding(run, data).fingerprint  # a run of an earlier version has no copy
    copy_encoding(run, data)
    shutil.move(data, tmp_path / "moved")
    assert run_encoding(run, data).fingerprint == expected
    run.encoding.unlink()
    with pytest.raises(ConfigError, match=f"data.path = {data} has no encoding.json.*--set data.path=DIR"):
        run_encoding(run, data)
