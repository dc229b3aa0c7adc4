"""Preparation on a cluster: real submitit jobs on this machine."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare.chunk import Chunk
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.progress import Progress
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.spans import Span
from launcher.cluster import ClusterConfig
from launcher.commands.prepare_on_cluster import ClusterEncoder, TaskShare
from launcher.scheduler.protocol import SubmittedJob
from tests.unit.data_pipeline.support import config, files_of, packaged_texts, write_jsonl
from tests.unit.launcher.fake_slurm import FakeJob, FakeSlurm

LOCAL = ClusterConfig(kind="local")


@pytest.fixture
def wanted(tmp_path: Path) -> DataPrepConfig:
    """A preparation of several pieces, which leaves out duplicates."""
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
    """End a local job and its task, as the loss of its node would."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for process in (pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_jobs_make_the_same_bytes_and_a_killed_one_starts_again_alone(
    tmp_path: Path, wanted: DataPrepConfig
) -> None:
    alone = wanted.model_copy(update={"out": tmp_path / "alone"})
    prepare(alone)
    seen: list[str] = []

    def kill_the_second(message: str) -> None:
        if message.startswith("task 2 of 2: local job "):
            kill_job(int(message.split()[-1]))

    prepare(wanted, with_messages(seen, kill_the_second), ClusterEncoder(LOCAL, 2, workers=1))
    assert files_of(wanted.out) == files_of(alone.out)
    again = [message for message in seen if "starts again" in message]
    assert len(again) == 2  # once for hashing, once for encoding
    assert all(message.startswith("task 2 failed and starts again as job ") for message in again)


def test_job_that_keeps_failing_ends_the_preparation_with_its_reason(
    wanted: DataPrepConfig,
) -> None:
    source = Path(wanted.sources[0])
    text = source.read_bytes()
    seen: list[str] = []

    def lose_the_source(message: str) -> None:
        if message.startswith("task 1 of 1"):
            source.unlink(missing_ok=True)

    with pytest.raises(DataError) as error:
        prepare(wanted, with_messages(seen, lose_the_source), ClusterEncoder(LOCAL, 1, workers=1))
    assert str(error.value).startswith("task 1 failed 3 times; the last time: ")
    assert "a.jsonl: it cannot be read any more: No such file" in str(error.value)
    assert str(error.value).endswith("The finished chunks stay; run the command again to continue.")
    assert sum("starts again" in message for message in seen) == 2
    source.write_bytes(text)
    assert prepare(wanted).documents == 60


def test_slurm_is_asked_about_all_jobs_at_once_and_every_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked_at = [0.0], list[float]()
    slurm = FakeSlurm()
    slurm.jobs = {f"7_{number}": FakeJob() for number in range(3)}
    monkeypatch.setattr(slurm, "before", lambda _command: asked_at.append(now[0]))
    slurm.install(monkeypatch)
    monkeypatch.setattr("launcher.commands.prepare_on_cluster.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "launcher.commands.prepare_on_cluster.time.sleep",
        lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    monkeypatch.setattr("launcher.commands.prepare_on_cluster.is_done", lambda *_: now[0] >= 60)
    source = SourceFile("a", str(tmp_path / "a"), 9, 0)
    pieces = [Chunk((Span(source, start, start + 3),)) for start in (0, 3, 6)]
    shares = [TaskShare(number, (pieces[number],), SubmittedJob(f"7_{number}")) for number in range(3)]
    encoder = ClusterEncoder(ClusterConfig(kind="slurm"), 3, None)
    done = list(encoder.follow(shares, None, tmp_path, "hash"))
    assert {piece for piece in done if isinstance(piece, Chunk)} == set(pieces)
    assert 12 <= len(asked_at) <= 13
    assert {command[0] for command in slurm.asked} == {"squeue"}
    assert all(later - earlier >= 5 for earlier, later in pairwise(asked_at))
