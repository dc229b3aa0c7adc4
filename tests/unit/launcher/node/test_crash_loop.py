"""The error that a crashed worker printed, among what torchrun prints."""

from pathlib import Path

import pytest

from launcher.node.crash_loop import last_error

TORCHRUN = """E1201 09:13:34.611000 13196 torch/distributed/elastic/multiprocessing/api.py:1002] failed \
(exitcode: -11) local_rank: 3 (pid: 13206) of binary: /usr/bin/python
Traceback (most recent call last):
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
gpt.train FAILED
"""


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("Traceback:\nRuntimeError: no interface ib9\n", "RuntimeError: no interface ib9"),
        ("data_pipeline.errors.ConfigError: a\nb\n", "data_pipeline.errors.ConfigError: a"),
        (
            "KeyError: 'x'\nModuleNotFoundError: No module named 'y'\n",
            "ModuleNotFoundError: No module named 'y'",
        ),
        ("no traceback\n", "the worker of local rank 3 ended with exit code -11"),
    ],
)
def test_last_error_is_that_of_a_worker(tmp_path: Path, printed: str, error: str) -> None:
    output = tmp_path / "node-0.log"
    output.write_text("ValueError: of an earlier generation\n" + printed + TORCHRUN)
    assert last_error(output, start=len("ValueError: of an earlier generation\n")) == error


def test_output_without_an_error_has_none(tmp_path: Path) -> None:
    output = tmp_path / "node-0.log"
    assert last_error(output) is None
    output.write_text("all is well\n")
    assert last_error(output) is None
