"""Copies beside the computing stream, with a stand-in for a GPU's stream that lists what is queued."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.sampling.batch import Batch
from gpt.distributed import device_copies
from gpt.distributed.zero.state import StatePart
from gpt.saving import snapshot as snapshot_module
from gpt.saving.background_task import BackgroundTask
from gpt.saving.snapshot import Snapshot
from gpt.training import prefetch as prefetch_module
from gpt.training.prefetch import Prefetcher
from gpt.training.step import model_inputs

GPU = torch.device("cuda", 1)


class Event:
    def __init__(self, queue: list[Any], after: int, ms: float = 0.0) -> None:
        self.queue, self.after, self.ms = queue, after, ms

    def synchronize(self) -> None:
        self.queue.append(("host waits", self.after))

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return other.ms - self.ms


class Stream:
    """What a SideStream is asked for, in order. Copies happen at once."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.pinned_pointers: set[int] = set()
        self.now_ms = 0.0

    def after_compute(self) -> None:
        self.queue.append("after compute")

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.queue.append("copying")
        yield
        self.queue.append("copied")

    def mark(self) -> Event:
        return Event(self.queue, len(self.queue))

    def mark_compute(self) -> Event:
        self.now_ms += 250.0
        return Event(self.queue, len(self.queue), self.now_ms)

    def hold_compute(self, copied: Event, *tensors: Tensor) -> None:
        self.queue.append(("compute waits", copied.after, [t.data_ptr() for t in tensors]))

    def pinned(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        self.pinned_pointers.add(buffer.data_ptr())
        return buffer

    def to_device(self, pinned: Tensor) -> Tensor:
        self.queue.append(
            ("to device", pinned.data_ptr() in self.pinned_pointers, threading.current_thread())
        )
        return pinned.clone()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    fake = Stream()
    for module in (snapshot_module, prefetch_module):
        monkeypatch.setattr(module, "side_stream", lambda _: fake)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: fake.queue.append(("current", device)))
    return fake


class OneBatch:
    """A reader whose steps all have two sequences of unequal documents."""

    def batch(self, step: int, *_: int) -> Batch:
        tokens = np.arange(10, dtype=np.int64).reshape(2, 5) + step
        ends = np.array([3, 4, 8], dtype=np.int32)
        scored = np.ones((2, 4), dtype=bool)
        return Batch(tokens, document_ends=ends, scored=scored, sequence_numbers=np.array([7, 8]))


class OneRank:
    device, data_rank, data_size, is_counting = GPU, 0, 1, True


def test_a_step_reaches_the_gpu_in_one_pinned_copy_for_which_only_kernels_wait(stream: Stream) -> None:
    batches = Prefetcher(OneBatch(), OneRank(), micro_batch=1, first=1, last=1)  # type: ignore[arg-type]
    assert batches.scored_tokens(1) == 8
    current, (what, is_pinned, thread) = stream.queue
    assert current == ("current", GPU)  # before the thread touches the GPU
    assert (what, is_pinned) == ("to device", True) and thread is not threading.main_thread()
    loaded = batches.get(1)
    assert loaded.copy is not None
    assert stream.queue[2:] == [("compute waits", 2, [loaded.copy[0].data_ptr()])]
    parts = [model_inputs(part) for part in OneBatch().batch(1, 0, 1).micro_batches(1)]
    for (ids, targets, documents), (ids_, targets_, documents_) in zip(
        loaded.micro_batches, parts, strict=True
    ):
        assert torch.equal(ids, ids_) and torch.equal(targets, targets_)
        assert torch.equal(documents.cumulative_n1, documents_.cumulative_n1)
        assert (documents.lengths, documents.longest) == (documents_.lengths, documents_.longest)
        assert ids.dtype == torch.int64 and documents.cumulative_n1.dtype == torch.int32


def test_the_update_after_a_save_waits_for_its_copy_and_nothing_else_does(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[tuple[int, int]] = []
    monkeypatch.setattr(snapshot_module, "pin", lambda b: registered.append((b.data_ptr(), b.nbytes)))
    snapshot = Snapshot(6, GPU)
    [(_, nbytes)] = registered
    assert nbytes == 24 and not snapshot.is_queued
    state = [StatePart("g", name, 0, 3, torch.full((3,), value)) for name, value in (("a", 1.0), ("b", 2.0))]
    snapshot.take(iter(state))
    assert stream.queue == ["after compute", "copying", "copied"] and snapshot.is_queued
    assert snapshot.device_seconds() == 0.0
    snapshot.hold_update()
    assert stream.queue[3:] == [("compute waits", 3, [])]
    assert snapshot.device_seconds() == 0.25
    assert next(snapshot.parts()).tolist() == [1.0] * 3 + [2.0] * 3
    assert stream.queue[4:] == [("host waits", 3)]


def test_the_thread_of_a_save_uses_the_gpu_of_its_rank(stream: Stream) -> None:
    task = BackgroundTask(lambda: stream.queue.append("action"), GPU)  # type: ignore[func-returns-value]
    task.wait()
    assert stream.queue == [("current", GPU), "action"]


@pytest.mark.usefixtures("stream")
def test_a_snapshot_that_cannot_be_pinned_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[int, int, int]] = []

    class Runtime:
        @staticmethod
        def cudaHostRegister(pointer: int, nbytes: int, flags: int) -> ctypes.c_int:
            calls.append((pointer, nbytes, flags))
            return 2  # type: ignore[return-value]

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    assert device_copies.pin(torch.zeros(5)) == "cudaHostRegister of 20 bytes: error 2"
    Snapshot(6, GPU)
    assert [call[1:] for call in calls] == [(20, 0), (24, 0)]
    assert "not pinned: cudaHostRegister of 24 bytes: error 2" in capsys.readouterr().out
