"""Batches read in a thread, a few steps ahead of the step that computes.

A batch is a pure function of the step, so a checkpoint stores nothing about it. The thread also brings a step
to a GPU: with one copy, from pinned memory, on a stream of its own.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor
from xxhash import xxh3_64_intdigest

from data_pipeline.errors import OutlastError
from data_pipeline.sampling.batch import Batch
from data_pipeline.sampling.batches import BatchReader
from gpt.distributed.device_copies import side_stream, use_in_this_thread
from gpt.distributed.world import World
from gpt.model.hardware import Event
from gpt.training.staging import pack, unpack
from gpt.training.step import ModelInputs, model_inputs

AHEAD = 2  # the ranks agree on the scored tokens of step n + 2 while step n + 1 computes


@dataclass(frozen=True)
class Loaded:
    """This rank's part of one step, split into micro-batches on the device.

    Of the ranks that share sequences, only the first counts tokens and digest; the others have 0.
    """

    micro_batches: list[ModelInputs]
    scored_tokens: int
    digest: int
    copy: tuple[Tensor, Event] | None = None  # the buffer of the micro-batches, and when it is there


class Prefetcher:
    """Returns the steps in rising order and reads AHEAD more meanwhile."""

    def __init__(self, reader: BatchReader, world: World, micro_batch: int, first: int, last: int) -> None:
        self._reader, self._world, self._micro_batch, self._last = reader, world, micro_batch, last
        self._stream = side_stream(world.device)
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="prefetch", initializer=use_in_this_thread, initargs=(world.device,)
        )
        self._futures: dict[int, Future[Loaded]] = {}
        for step in range(first, min(first + AHEAD, last + 1)):
            self._start(step)

    def get(self, step: int) -> Loaded:
        """This rank's part of `step`. Raises the error that reading it raised."""
        if step + AHEAD <= self._last:
            self._start(step + AHEAD)
        return self._arrived(self._futures.pop(step).result())

    def peek(self, step: int) -> Loaded:
        """This rank's part of `step`, which stays available to `get`."""
        return self._arrived(self._futures[step].result())

    def scored_tokens(self, step: int) -> int:
        """The scored tokens of this rank at `step`, at most AHEAD steps from now; 0 past the last step."""
        return self._futures[step].result().scored_tokens if step <= self._last else 0

    def error(self, step: int) -> OutlastError | None:
        """Outlast's own error that reading `step` raised, if any."""
        error = self._futures[step].exception() if step <= self._last else None
        return error if isinstance(error, OutlastError) else None

    def _start(self, step: int) -> None:
        self._futures[step] = self._pool.submit(self._load, step)

    def _load(self, step: int) -> Loaded:
        world = self._world
        batch: Batch = self._reader.batch(step, world.data_rank, world.data_size)
        parts = [model_inputs(part) for part in batch.micro_batches(self._micro_batch)]
        copy = None
        if self._stream is not None:
            buffer = self._stream.to_device(pack(parts, self._stream.pinned))
            parts, copy = unpack(buffer, parts), (buffer, self._stream.mark())
        if not world.is_counting:
            return Loaded(parts, 0, 0, copy)
        return Loaded(parts, int(batch.scored.sum()), digest(batch), copy)

    def _arrived(self, loaded: Loaded) -> Loaded:
        """`loaded`, for which the kernels that are queued from now on wait."""
        if self._stream is not None and loaded.copy is not None:
            buffer, copied = loaded.copy
            self._stream.hold_compute(copied, buffer)
        return loaded


def digest(batch: Batch) -> int:
    """A number that identifies what was read; its sum over the ranks does not depend on the world size.

    Each sequence contributes 32 bits of a hash of its tokens and its global sequence number. The sum over a
    step of up to two million sequences is exact in fp64.
    """
    rows = zip(batch.sequence_numbers.tolist(), batch.tokens, strict=True)
    return sum(
        xxh3_64_intdigest(tokens.tobytes(), number & 0xFFFF_FFFF) & 0xFFFF_FFFF for number, tokens in rows
    )
