"""Writes lines of the record and checkpoints, as the processes of a run would."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.sampling.skip_list import Ranges
from gpt.checkpoint.format import rank_name, step_name
from gpt.run import record
from gpt.run.run_dir import RunDir
from launcher.runs.store import read_config
from tests.unit.gpt.checkpoint.support import write_checkpoint


def record_step(run: RunDir, number: int, **more: float) -> None:
    numbers = {"train/loss": 9.0 - number / 10, "train/tokens_per_second": 100.0, "train/step_seconds": 2.0}
    record.append(run.metrics, step=number, tokens=number * 1024, **numbers, **more)


def commit(run: RunDir, *steps: int, skipped: Ranges = ()) -> None:
    """Whole checkpoints of the run's network."""
    config = read_config(run)
    data = joint_fingerprint([read_manifest(source.path) for source in config.data.sources])
    for step in steps:
        fields = {"data_fingerprint": data, "skipped": skipped}
        write_checkpoint(run.checkpoints, step=step, world_size=1, config=config, **fields)


def spoil(run: RunDir, number: int) -> Path:
    """Change a byte of the checkpoint of step `number`."""
    path = run.checkpoints / step_name(number) / rank_name(0)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    return path


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: the checks of permissions need another user."""
    if (user := os.geteuid()) != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
