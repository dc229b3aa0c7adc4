"""Preparation in tasks: real submitit jobs on this machine."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare import DataPrepConfig, Progress, prepare
from launcher.cluster import ClusterConfig
from launcher.spread import Spread
from tests.unit.data_support import config, files_of, packaged_texts, write_jsonl

LOCAL = ClusterConfig(kind="local")


@pytest.fixture
def wanted(tmp_path: Path) -> DataPrepConfig:
    """A preparation of several pieces, of which copies are to be left out."""
    texts = packaged_texts()[:60]
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:3]])
    return config(tmp_path / "out", source, shard_tokens=5000, deduplicate=True)


def with_messages(seen: list[str], act: Callable[[str], None]) -> Callable[[Progress], None]:
    def progress(now: Progress) -> None:
        if now.message is not None:
            seen.append(now.message)
            act(now.message)

    return progress


def kill_job(pid: int) -> None:
    """End a local job and its task, as a node that is lost does."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for process in (pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_tasks_make_the_same_bytes_and_one_that_is_killed_starts_again_alone(
    tmp_path: Path, wanted: DataPrepConfig
) -> None:
    alone = wanted.model_copy(update={"out": tmp_path / "alone"})
    prepare(alone)
    seen: list[str] = []

    def kill_the_second(message: str) -> None:
        if message.startswith("task 2 of 2: local job "):
            kill_job(int(message.split()[-1]))

    prepare(wanted, with_messages(seen, kill_the_second), Spread(LOCAL, 2, workers=1))
    assert files_of(wanted.out) == files_of(alone.out)
    again = [message for message in seen if "starts again" in message]
    assert len(again) == 2  # once for hashing, once for encoding
    assert all(message.startswith("task 2 failed and starts again as job ") for message in again)


def test_a_task_that_fails_again_and_again_ends_the_preparation_with_its_reason(
    wanted: DataPrepConfig,
) -> None:
    source = Path(wanted.sources[0])
    text = source.read_bytes()
    seen: list[str] = []

    def lose_the_source(message: str) -> None:
        if message.startswith("task 1 of 1"):
            source.unlink(missing_ok=True)

    with pytest.raises(DataError) as error:
        prepare(wanted, with_messages(seen, lose_the_source), Spread(LOCAL, 1, workers=1))
    assert str(error.value).startswith("task 1 failed 3 times, at last: FileNotFoundError: [Errno 2]")
    assert str(error.value).endswith("What is finished stays; run again to continue")
    assert sum("starts again" in message for message in seen) == 2
    source.write_bytes(text)
    assert prepare(wanted).documents == 60
