"""Reads any part of any state of a checkpoint, from whichever ranks wrote it, and verifies what it reads.

A reader maps a range of a group's state, or a region of a parameter, to byte ranges of rank files and reads
only the chunks that it needs. Another world size, or a laptop that wants the weights alone, is therefore the
ordinary case. It needs neither torch nor DeepSpeed nor a process group.
"""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import (
    BadBytes,
    CheckpointIndex,
    Corrupt,
    RankFrame,
    committed,
    read_chunk,
    read_index,
    read_rank_frame,
)
from gpt.checkpoint.layout import Region, region_ranges
from gpt.checkpoint.patience import patiently
from gpt.run.run_dir import RunDir


class CheckpointReader:
    """One committed checkpoint. Every read raises Corrupt if its bytes are not as written, or Unreadable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: CheckpointIndex = read_index(folder)
        self.bytes_read = 0
        self._frames: dict[int, RankFrame] = {}
        # Neighbouring reads share a chunk, so the last few are kept.
        self._chunk = lru_cache(maxsize=4)(self._read_shared_chunk)

    def read(
        self, group_name: str, state: str, start: int, end: int, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Elements `start` to `end` of one state of a group; they are read into `out` if it is given.

        After an error the content of `out` is undefined.
        """
        stretches = list(self.index.layouts[group_name].locate(start, end))
        for rank in {stretch.rank for stretch in stretches}:
            self._frame(rank)  # checks the sizes of the files before memory is allocated for their content
        if out is None:
            out = np.empty(end - start, dtype="<f4")
        content = out.data.cast("B") if len(out) else memoryview(b"")
        done = 0
        for stretch in stretches:
            count = 4 * stretch.length
            self._fill(content[done : done + count], stretch.rank, f"{group_name}.{state}", stretch.offset)
            done += count
        return out

    def parameter(
        self, name: str, state: str = "master", region: Region | None = None
    ) -> NDArray[np.float32]:
        """One state of a parameter in its shape, or only the `region` of it."""
        entry = next(entry for entry in self.index.parameters if entry.name == name)
        if region is None:
            flat = self.read(entry.group, state, entry.offset, entry.offset + entry.numel)
            return flat.reshape(entry.shape)
        parts = [
            self.read(entry.group, state, entry.offset + start, entry.offset + end)
            for start, end in region_ranges(entry.shape, region)
        ]
        flat = np.concatenate(parts) if parts else np.empty(0, dtype="<f4")
        return flat.reshape([end - start for start, end in region])

    def _frame(self, rank: int) -> RankFrame:
        frame = self._frames.get(rank)
        if frame is None:
            frame = self._frames[rank] = read_rank_frame(self.folder, self.index, rank)
        return frame

    def _fill(self, target: memoryview, rank: int, tensor: str, start: int) -> None:
        """Fill `target` with a tensor's bytes from element `start` on; whole chunks are read in place."""
        frame = self._frame(rank)
        position = frame.tensors[tensor][0] - frame.data_start + 4 * start
        while len(target):
            number, within = divmod(position, frame.chunk_bytes)
            first, last = frame.chunk(number)
            count = min(last - first - within, len(target))
            if count == last - first:
                self._read_chunk(rank, number, target[:count])
            else:
                target[:count] = self._chunk(rank, number)[within : within + count]
            position += count
            target = target[count:]

    def _read_shared_chunk(self, rank: int, number: int) -> memoryview:
        first, last = self._frames[rank].chunk(number)
        content = memoryview(bytearray(last - first))
        self._read_chunk(rank, number, content)
        return content

    def _read_chunk(self, rank: int, number: int, target: memoryview) -> None:
        path = self.folder / self.index.files[rank].name

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                read_chunk(file, path, self._frames[rank], number, target)

        try:
            patiently(path, read)
        except FileNotFoundError:
            raise Corrupt(BadBytes(path, 0, "missing")) from None
        self.bytes_read += len(target)


def intact_candidates(run_dir: RunDir, step: int | None) -> Iterator[tuple[int, CheckpointReader]]:
    """Step and reader of the checkpoint of `step`, or of every checkpoint, newest first.

    A checkpoint with a corrupt index is reported and skipped; a corrupt rank file raises Corrupt when it
    is read. Raises ConfigError when there is no such checkpoint.
    """
    candidates = [(s, folder) for s, folder in committed(run_dir.checkpoints) if step in (None, s)]
    if not candidates:
        if step is None:
            raise ConfigError(f"{run_dir.path} has no checkpoint yet")
        known = ", ".join(str(s) for s, _ in committed(run_dir.checkpoints)) or "none"
        raise ConfigError(f"{run_dir.path} has no checkpoint of step {step}. Available steps: {known}.")
    for found, folder in reversed(candidates):
        try:
            reader = CheckpointReader(folder)
        except Corrupt as error:
            print(f"{folder.name} is skipped: {error}", file=sys.stderr)
            continue
        yield found, reader
