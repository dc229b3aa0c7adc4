"""The processes that encode chunks: started, fed, listened to, ended.

Nothing but chunks and counts goes through the parent. A worker that dies ends the preparation with an
error; a worker whose parent died ends at its next word.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection, forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from data_pipeline.errors import DataError
from data_pipeline.prepare.chunk import Chunk, read_chunk_record
from data_pipeline.prepare.dedup import hash_chunk, is_hashed
from data_pipeline.prepare.encode import EncodeSettings, encode_chunk
from data_pipeline.prepare.progress import Advance
from data_pipeline.tokenizer.encoding import load_encoding
from data_pipeline.tokenizer.fast_encoder import open_encoder

Task = Literal["encode", "hash"]


class EncodeAll(Protocol):
    """Who encodes chunks: `encode_all` on this machine, or something that spreads them over several."""

    def __call__(
        self,
        folder: Path,
        chunks: Sequence[Chunk],
        settings: EncodeSettings,
        workers: int,
        /,
        task: Task = "encode",
    ) -> Generator[Advance | Chunk, None, None]: ...


def is_done(folder: Path, chunk: Chunk, task: Task) -> bool:
    """Whether `task` is done for `chunk`, all of it on disk."""
    return is_hashed(folder, chunk) if task == "hash" else read_chunk_record(folder, chunk) is not None


def encode_all(
    folder: Path, chunks: Sequence[Chunk], settings: EncodeSettings, workers: int, task: Task = "encode"
) -> Generator[Advance | Chunk, None, None]:
    """Encode and commit `chunks` on `workers` processes: yields advances, and each chunk when committed.

    The task "hash" hashes their documents instead. With one worker it all happens in this process. Raises
    DataError where a worker is killed or fails.
    """
    if workers == 1 or len(chunks) < 2:
        do, message = _skill(folder, settings, task)
        if message:
            yield Advance(0, 0, 0, message)
        for chunk in chunks:
            yield from do(chunk)
            yield chunk
        return
    pool = _WorkerPool(folder, settings, min(workers, len(chunks)), task)
    try:
        yield from pool.work(chunks)
    finally:
        pool.end()


def _skill(
    folder: Path, settings: EncodeSettings, task: Task
) -> tuple[Callable[[Chunk], Iterator[Advance]], str | None]:
    """What a worker does with a chunk, and a sentence for the user."""
    if task == "hash":
        return partial(_hash, folder, settings), None
    encoding = load_encoding(settings.encoding)
    encoder, message = open_encoder(encoding, settings.encoder)

    def encode(chunk: Chunk) -> Iterator[Advance]:
        return encode_chunk(folder, chunk, settings, encoding, encoder)

    return encode, message


def _hash(folder: Path, settings: EncodeSettings, chunk: Chunk) -> Iterator[Advance]:
    for _ in hash_chunk(folder, chunk, settings.text_field):
        yield Advance(0, 0, 0)


def start_ahead() -> None:
    """Let the process from which the others are forked import what they need, while the caller goes on."""
    _context()
    forkserver.ensure_running()


def _context() -> ForkServerContext:
    """A fork of the caller would take locks of its threads along; one that has none imports once for all."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "data_pipeline.prepare.worker_pool", "data_pipeline.tokenizer.fast_encoder"]
    )
    return context


class _WorkerPool:
    """Worker processes, each on a pipe of its own: one that dies is noticed, and none outlives the pipe."""

    def __init__(self, folder: Path, settings: EncodeSettings, size: int, task: Task) -> None:
        context = _context()
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, dict(os.environ), folder, settings, task)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def work(self, chunks: Sequence[Chunk]) -> Iterator[Advance | Chunk]:
        waiting = deque(chunks)
        busy: dict[Connection, Chunk] = {}
        for pipe in self._processes:
            busy[pipe] = waiting.popleft()
            self._tell(pipe, busy[pipe])
        while busy:
            for ready in connection.wait(list(busy)):
                pipe = cast(Connection, ready)
                message = self._hear(pipe)
                if isinstance(message, Advance):
                    yield message
                    continue
                yield busy.pop(pipe)
                if waiting:
                    busy[pipe] = waiting.popleft()
                    self._tell(pipe, busy[pipe])

    def _tell(self, pipe: Connection, chunk: Chunk) -> None:
        with suppress(BrokenPipeError):  # its death is heard of next
            pipe.send(chunk)

    def _hear(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[pipe]
            process.join()
            raise DataError(
                f"a worker process ended with exit code {process.exitcode} (-9 is a kill, mostly for want of "
                f"memory). What is finished stays: run again to continue, with fewer workers if need be"
            ) from None
        if isinstance(message, Exception):
            raise message
        return message

    def end(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            process.terminate()
            process.join()


def _serve(
    pipe: Connection, environment: Mapping[str, str], folder: Path, settings: EncodeSettings, task: Task
) -> None:
    """A worker's life: chunks in; advances, None for a committed chunk, or an exception out."""
    os.environ.update(environment)  # the caller's may have changed since its first workers were forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    with suppress(EOFError, ConnectionError):  # the parent is gone
        try:
            do, message = _skill(folder, settings, task)
            if message:
                pipe.send(Advance(0, 0, 0, message))
            while True:
                for advance in do(pipe.recv()):
                    pipe.send(advance)
                pipe.send(None)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)
