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
from gpt.run.run_dir import RunDir


class CheckpointReader:
    """One committed checkpoint. Every read raises format.Corrupt when its bytes are not as written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: CheckpointIndex = read_index(folder)
        self.bytes_read = 0
        self._layouts: dict[int, RankLayout] = {}
        # Neighbouring reads meet in one chunk: keep the last few.
        self._chunk = lru_cache(maxsize=4)(self._read_part)

    def read(
        self, group_name: str, state: str, start: int, end: int, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Elements `start` to `end` of one flat state of a group; in `out`, of their number, if it is given.

        What `out` holds after an error is of no use.
        """
        pieces = list(self.index.layouts[group_name].locate(start, end))
        for rank in {piece.rank for piece in pieces}:
            self._layout(rank)  # the files are as large as the index says, before memory is taken for it
        if out is None:
            out = np.empty(end - start, dtype="<f4")
        content = out.data.cast("B") if len(out) else memoryview(b"")
        done = 0
        for piece in pieces:
            count = 4 * piece.length
            self._fill(content[done : done + count], piece.rank, f"{group_name}.{state}", piece.offset)
            done += count
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

    def _fill(self, target: memoryview, rank: int, tensor: str, start: int) -> None:
        """The bytes of a tensor from element `start` on, as many as `target` takes; whole chunks in place."""
        layout = self._layout(rank)
        position = layout.tensors[tensor][0] - layout.data_start + 4 * start
        while len(target):
            number, within = divmod(position, layout.chunk_bytes)
            first, last = layout.chunk(number)
            count = min(last - first - within, len(target))
            if count == last - first:
                self._read_chunk(rank, number, target[:count])
            else:
                target[:count] = self._chunk(rank, number)[within : within + count]
            position += count
            target = target[count:]

    def _read_part(self, rank: int, number: int) -> memoryview:
        first, last = self._layouts[rank].chunk(number)
        content = memoryview(bytearray(last - first))
        self._read_chunk(rank, number, content)
        return content

    def _read_chunk(self, rank: int, number: int, target: memoryview) -> None:
        path = self.folder / self.index.files[rank].name
        with path.open("rb", buffering=0) as file:
            read_chunk(file, path, self._layouts[rank], number, target)
        self.bytes_read += len(target)


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
