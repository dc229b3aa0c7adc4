"""The arrangement of the ranks, for the dimensions of today and for a tensor dimension."""

import pytest

from gpt.distributed.mesh import DATA, SEQUENCE, Mesh


@pytest.mark.parametrize("size", [1, 2, 6])
def test_data_parallel_ranks_each_have_their_own_part(size: int) -> None:
    mesh = Mesh.over(size)
    assert mesh.size(DATA) == size
    assert [mesh.coordinates(rank)[DATA] for rank in range(size)] == list(range(size))
    assert mesh.groups(DATA) == [list(range(size))]
    assert all(mesh.is_first_outside(rank, DATA) for rank in range(size))


def test_neighbours_share_sequences() -> None:
    mesh = Mesh.over(6, sequence=3)
    assert mesh.size(DATA) == 2
    assert [mesh.coordinates(rank)[DATA] for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert mesh.groups(SEQUENCE) == [[0, 1, 2], [3, 4, 5]]
    assert mesh.groups(DATA) == [[0, 3], [1, 4], [2, 5]]
    assert [rank for rank in range(6) if mesh.is_first_outside(rank, DATA)] == [0, 3]


def test_tensor_dimension_needs_no_change_elsewhere() -> None:
    """Tensor-parallel ranks read the same sequences, and one rank of each group counts them."""
    mesh = Mesh.over(8, sequence=2, tensor=2)
    assert mesh.coordinates(6) == {DATA: 1, SEQUENCE: 1, "tensor": 0}
    assert [mesh.coordinates(rank)[DATA] for rank in range(8)] == [0] * 4 + [1] * 4
    assert mesh.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups(SEQUENCE) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups(DATA) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [rank for rank in range(8) if mesh.is_first_outside(rank, DATA)] == [0, 4]


@pytest.mark.parametrize("shared", [{}, {"sequence": 2}, {"sequence": 2, "tensor": 3}, {"tensor": 12}])
def test_groups_of_every_dimension_partition_the_ranks(shared: dict[str, int]) -> None:
    mesh = Mesh.over(12, **shared)
    for dimension in mesh.sizes:
        groups = mesh.groups(dimension)
        assert all(len(group) == mesh.size(dimension) for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(12))
        for group in groups:
            assert [mesh.coordinates(rank)[dimension] for rank in group] == list(range(len(group)))


def test_mesh_must_fill_the_world() -> None:
    with pytest.raises(AssertionError, match="6 processes do not fill a mesh of"):
        Mesh.over(6, sequence=4)
