"""Placements: every element is stored once, and any region of a parameter is found again.

`ColumnPlacement` is a placement that Outlast does not have: it cuts matrices by columns, as a tensor-parallel
layer does. It needs nothing but its own class and an entry in PLACEMENTS.
"""

from bisect import bisect_right
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.checkpoint.format import Corrupt, ParameterEntry, read_index, verify
from gpt.checkpoint.layout import PLACEMENTS, GroupLayout, Kind, Placement, Region, Stretch, region_ranges
from gpt.checkpoint.reader import CheckpointReader
from tests.unit.gpt.checkpoint.support import STATES, flat_state, write_checkpoint

W, V = (6, 10), (4, 8)
PARAMETERS = (
    ParameterEntry(name="w", shape=W, group="decay", offset=0),
    ParameterEntry(name="v", shape=V, group="decay", offset=prod(W)),
    ParameterEntry(name="g", shape=(5,), group="no_decay", offset=0),
)


class ColumnPlacement(Placement):
    """Each rank holds the same share of every row of every matrix; rank 0 holds the vectors."""

    def extents(self, rank: int) -> list[tuple[int, int]]:
        return [
            (first + row * shape[-1] + low, first + row * shape[-1] + high)
            for first, shape in zip(self.starts, self.shapes, strict=False)
            for low, high in [self._columns(shape, rank)]
            for row in range(prod(shape[:-1]))
        ]

    def locate(self, start: int, end: int) -> Iterator[Stretch]:
        position = start
        while position < end:
            index = bisect_right(self.starts, position) - 1
            row, column = divmod(position - self.starts[index], self.shapes[index][-1])
            columns = {rank: self._columns(self.shapes[index], rank) for rank in range(self.world_size)}
            rank = next(rank for rank, (low, high) in columns.items() if low <= column < high)
            low, high = columns[rank]
            length = min(end - position, high - column)
            yield Stretch(rank, self._offset(index, rank) + row * (high - low) + column - low, length)
            position += length

    def _columns(self, shape: tuple[int, ...], rank: int) -> tuple[int, int]:
        if len(shape) == 1:
            return (0, shape[0]) if rank == 0 else (0, 0)
        return shape[-1] * rank // self.world_size, shape[-1] * (rank + 1) // self.world_size

    def _offset(self, index: int, rank: int) -> int:
        widths = [(shape, self._columns(shape, rank)) for shape in self.shapes[:index]]
        return sum(prod(shape[:-1]) * (high - low) for shape, (low, high) in widths)


@pytest.fixture(autouse=True, scope="module")
def columns() -> Iterator[None]:
    PLACEMENTS["columns"] = ColumnPlacement
    yield
    del PLACEMENTS["columns"]


def elements(layout: GroupLayout, rank: int) -> list[int]:
    return [index for start, end in layout.extents(rank) for index in range(start, end)]


@pytest.mark.parametrize("kind", ["flat", "sharded", "columns"])
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    world_size=st.integers(1, 7),
)
def test_every_element_is_owned_once_and_found_where_it_is_stored(
    kind: Kind, shapes: list[tuple[int, ...]], world_size: int
) -> None:
    numel = sum(map(prod, shapes))
    layout = GroupLayout(kind, world_size, shapes, -(-numel // world_size))
    files = [elements(layout, rank) for rank in range(world_size)]
    assert sorted(index for file in files for index in file) == list(range(numel))
    assert [layout.owned_numel(rank) for rank in range(world_size)] == [len(file) for file in files]
    found = [i for s in layout.locate(0, numel) for i in files[s.rank][s.offset : s.offset + s.length]]
    assert found == list(range(numel))


@given(data=st.data())
def test_ranges_of_a_region_are_those_of_numpy_and_as_few_as_possible(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    region = [(low, data.draw(st.integers(low, n))) for n in shape for low in [data.draw(st.integers(0, n))]]
    ranges = list(region_ranges(shape, region))
    expected = np.arange(prod(shape)).reshape(shape)[tuple(slice(*bounds) for bounds in region)]
    assert [i for start, end in ranges for i in range(start, end)] == expected.flatten().tolist()
    whole = [(0, n) for n in shape]
    assert list(region_ranges(shape, whole)) == [(0, prod(shape))]


@pytest.mark.parametrize("layout", ["flat", "sharded", "columns"])
@pytest.mark.parametrize(
    "region", [None, ((0, 6), (0, 10)), ((1, 4), (3, 9)), ((5, 6), (9, 10)), ((2, 2), (0, 10))]
)
def test_region_of_a_parameter_reads_back_from_every_placement(
    tmp_path: Path, layout: Kind, region: Region | None
) -> None:
    folder = write_checkpoint(tmp_path, world_size=4, layout=layout, parameters=PARAMETERS)
    assert list(verify(folder)) == []
    reader = CheckpointReader(folder)
    for state in STATES:
        whole = flat_state("decay", state, prod(W) + prod(V))
        w, v = whole[: prod(W)].reshape(W), whole[prod(W) :].reshape(V)
        expected = w if region is None else w[tuple(slice(*bounds) for bounds in region)]
        assert np.array_equal(reader.parameter("w", state, region), expected)
        assert np.array_equal(reader.parameter("v", state), v)
    assert np.array_equal(reader.parameter("g"), flat_state("no_decay", "master", 5))


def test_strided_checkpoint_loads_into_the_parts_of_another_placement(tmp_path: Path) -> None:
    reader = CheckpointReader(
        write_checkpoint(tmp_path, world_size=4, layout="columns", parameters=PARAMETERS)
    )
    numel = prod(W) + prod(V)
    flat = GroupLayout("flat", 3, [W, V], -(-numel // 3))
    parts = [reader.read("decay", "master", *extent) for rank in range(3) for extent in flat.extents(rank)]
    assert np.array_equal(np.concatenate(parts), flat_state("decay", "master", numel))


def test_region_read_touches_only_the_ranks_that_hold_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, world_size=2, layout="columns", parameters=PARAMETERS)
    (folder / "rank-00001.safetensors").unlink()
    reader = CheckpointReader(folder)
    assert reader.parameter("w", region=((0, 6), (0, 5))).shape == (6, 5)
    with pytest.raises(Corrupt, match="missing"):
        reader.parameter("w")


def test_index_with_an_unknown_placement_or_too_small_parts_is_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, layout="columns", parameters=PARAMETERS)
    read_index(folder)
    monkeypatch.delitem(PLACEMENTS, "columns")
    with pytest.raises(Corrupt, match="'columns' is not one of flat, sharded"):
        read_index(folder)
    with pytest.raises(ValueError, match="3 parts of 4 do not hold 13 elements"):
        GroupLayout("flat", 3, [13], 4)
