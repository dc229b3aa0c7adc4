"""Reading a checkpoint by ranges: any part of any state, from whichever ranks wrote it, verified.

A reader maps (group, state, start, end) of the flat state to byte ranges of rank files and reads only
the chunks that it needs, so that another world size, or a laptop that wants the weights alone, is the
ordinary case. Without torch, DeepSpeed or a process group.
"""

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import (
    CheckpointIndex,
    Corrupt,
    RankLayout,
    committed,
    read_chunk,
    read_index,
    read_rank_layout,
)
from gpt.run_dir import RunDir


class CheckpointReader:
    """One committed checkpoint. Every read raises format.Corrupt when its bytes are not as written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: CheckpointIndex = read_index(folder)
        self.bytes_read = 0
        self._layouts: dict[int, RankLayout] = {}
        # Neighbouring reads meet in one chunk: keep the last few.
        self._chunk = lru_cache(maxsize=4)(self._read_chunk)

    def read(self, group_name: str, state: str, start: int, end: int) -> NDArray[np.float32]:
        """Elements `start` to `end` of one flat state of a group."""
        pieces = list(self.index.layouts[group_name].locate(start, end))
        for rank in {piece.rank for piece in pieces}:
            self._layout(rank)  # the files are as large as the index says, before memory is taken for it
        out = np.empty(end - start, dtype="<f4")
        done = 0
        for piece in pieces:
            name = f"{group_name}.{state}"
            content = self._read_bytes(piece.rank, name, piece.offset, piece.offset + piece.length)
            out[done : done + piece.length] = np.frombuffer(content, dtype="<f4")
            done += piece.length
        return out

    def parameter(self, name: str, state: str = "master") -> NDArray[np.float32]:
        """One whole parameter in its shape."""
        entry = next(entry for entry in self.index.parameters if entry.name == name)
        flat = self.read(entry.group, state, entry.offset, entry.offset + entry.numel)
        return flat.reshape(entry.shape)

    def _layout(self, rank: int) -> RankLayout:
        layout = self._layouts.get(rank)
        if layout is None:
            layout = self._layouts[rank] = read_rank_layout(self.folder, self.index, rank)
        return layout

    def _read_bytes(self, rank: int, tensor: str, start: int, end: int) -> bytes:
        layout = self._layout(rank)
        offset = layout.tensors[tensor][0] - layout.data_start
        low, high = offset + 4 * start, offset + 4 * end
        size = layout.chunk_bytes
        first = low // size
        parts = [self._chunk(rank, number) for number in range(first, -(-high // size))]
        content = b"".join(parts) if len(parts) != 1 else parts[0]
        return content[low - first * size : high - first * size]

    def _read_chunk(self, rank: int, number: int) -> bytes:
        path = self.folder / self.index.files[rank].name
        with path.open("rb") as file:
            content = read_chunk(file, path, self._layouts[rank], number)
        self.bytes_read += len(content)
        return content


def intact_candidates(run_dir: RunDir, step: int | None) -> Iterator[tuple[int, CheckpointReader]]:
    """Step and reader of checkpoint `step`, or of all, newest first; reads raise Corrupt where one is bad.

    Raises ConfigError when there is none.
    """
    candidates = [(s, folder) for s, folder in committed(run_dir.checkpoints) if step in (None, s)]
    if not candidates:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ConfigError(f"{run_dir.path} has no {which} yet")
    for found, folder in reversed(candidates):
        try:
            reader = CheckpointReader(folder)
        except Corrupt as error:
            print(f"{folder.name} is passed over: {error}", file=sys.stderr)
            continue
        yield found, reader
