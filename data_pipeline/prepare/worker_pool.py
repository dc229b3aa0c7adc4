"""The processes that encode or hash chunks.

Only chunks and progress reports pass through the parent process. If a worker dies, the preparation ends with
an error; if the parent dies, a worker exits the next time it reads from or writes to its pipe.
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
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from data_pipeline.tokenizer.fast_encoder import Encoder, EncoderChoice, open_encoder

Task = Literal["encode", "hash"]
OpenEncoder = Callable[[Encoding, EncoderChoice], tuple[Encoder, str | None]]


class EncodeAll(Protocol):
    """Runs a task on chunks: `encode_all` does it on this machine, other implementations on several."""

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
    """Whether `task` is done for `chunk` and its result is durable."""
    return is_hashed(folder, chunk) if task == "hash" else read_chunk_record(folder, chunk) is not None


def encode_all(
    folder: Path,
    chunks: Sequence[Chunk],
    settings: EncodeSettings,
    workers: int,
    task: Task = "encode",
    *,
    open_encoder: OpenEncoder = open_encoder,
) -> Generator[Advance | Chunk, None, None]:
    """Encode and commit `chunks` with `workers` processes; yields their progress, and each committed chunk.

    The task "hash" hashes the documents of the chunks instead. With one worker, this process does the work.
    Every worker opens its own encoder with `open_encoder`. Raises DataError if a worker is killed or fails.
    """
    if workers == 1 or len(chunks) < 2:
        run, message = _prepare_task(folder, settings, task, open_encoder)
        if message:
            yield Advance(0, 0, 0, message)
        for chunk in chunks:
            yield from run(chunk)
            yield chunk
        return
    pool = _WorkerPool(folder, settings, min(workers, len(chunks)), task, open_encoder)
    try:
        yield from pool.run(chunks)
    finally:
        pool.terminate()


def _prepare_task(
    folder: Path, settings: EncodeSettings, task: Task, open_encoder: OpenEncoder
) -> tuple[Callable[[Chunk], Iterator[Advance]], str | None]:
    """The function that runs `task` on a chunk, and an optional message for the user."""
    if task == "hash":
        return partial(_hash, folder, settings), None
    encoding = load_encoding(settings.encoding)
    encoder, message = open_encoder(encoding, settings.encoder)

    def encode(chunk: Chunk) -> Iterator[Advance]:
        return encode_chunk(folder, chunk, settings, encoding, encoder)

    return encode, message


def _hash(folder: Path, settings: EncodeSettings, chunk: Chunk) -> Iterator[Advance]:
    for _ in hash_chunk(folder, chunk, settings.text_field, settings.document_separator):
        yield Advance(0, 0, 0)


def start_fork_server() -> None:
    """Start the process from which workers are forked, so that it imports their modules in the background."""
    _context()
    forkserver.ensure_running()


def _context() -> ForkServerContext:
    """The multiprocessing context. Its fork server has no threads, whose locks a fork of the caller would
    copy, and imports the workers' modules only once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "data_pipeline.prepare.worker_pool", "data_pipeline.tokenizer.fast_encoder"]
    )
    return context


class _WorkerPool:
    """Worker processes, each with a pipe to the parent. A closed pipe shows that the other side died."""

    def __init__(
        self, folder: Path, settings: EncodeSettings, size: int, task: Task, open_encoder: OpenEncoder
    ) -> None:
        context = _context()
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, dict(os.environ), folder, settings, task, open_encoder)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, chunks: Sequence[Chunk]) -> Iterator[Advance | Chunk]:
        """Distribute `chunks` over the workers; yields their progress, and each finished chunk."""
        waiting = deque(chunks)
        busy: dict[Connection, Chunk] = {}
        for pipe in self._processes:
            busy[pipe] = waiting.popleft()
            self._send(pipe, busy[pipe])
        while busy:
            for ready in connection.wait(list(busy)):
                pipe = cast(Connection, ready)
                message = self._receive(pipe)
                if isinstance(message, Advance):
                    yield message
                    continue
                yield busy.pop(pipe)
                if waiting:
                    busy[pipe] = waiting.popleft()
                    self._send(pipe, busy[pipe])

    def _send(self, pipe: Connection, chunk: Chunk) -> None:
        with suppress(BrokenPipeError):  # the next receive reports the worker's death
            pipe.send(chunk)

    def _receive(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[pipe]
            process.join()
            raise DataError(
                f"a worker process ended with exit code {process.exitcode} (-9 means it was killed, usually "
                f"because memory ran out). Finished work is kept; run again to continue, with fewer workers "
                f"if memory is short"
            ) from None
        if isinstance(message, Exception):
            raise message
        return message

    def terminate(self) -> None:
        """End all workers."""
        for pipe, process in self._processes.items():
            pipe.close()
            process.terminate()
            process.join()


def _serve(
    pipe: Connection,
    environment: Mapping[str, str],
    folder: Path,
    settings: EncodeSettings,
    task: Task,
    open_encoder: OpenEncoder,
) -> None:
    """Runs in a worker: receives chunks; sends progress, None for a finished chunk, or an exception."""
    os.environ.update(environment)  # the caller may have changed it since the fork server started
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends them
    with suppress(EOFError, ConnectionError):  # the parent has exited
        try:
            run, message = _prepare_task(folder, settings, task, open_encoder)
            if message:
                pipe.send(Advance(0, 0, 0, message))
            while True:
                for advance in run(pipe.recv()):
                    pipe.send(advance)
                pipe.send(None)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)
