"""The format on disk: ranges read back, every corrupt byte is found, hostile files raise clean errors."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import (
    INDEX_NAME,
    Corrupt,
    ParameterEntry,
    committed,
    rank_name,
    read_index,
    verify,
)
from gpt.checkpoint.layout import Kind
from gpt.checkpoint.reader import CheckpointReader
from gpt.checkpoint.removal import prune
from gpt.checkpoint.writer import remove_leftovers, temporary_folder
from tests.unit.gpt.checkpoint.support import CHUNK_BYTES, STATES, flat_state, write_checkpoint


@settings(deadline=None, max_examples=40)
@given(world_size=st.integers(1, 5), data=st.data())
def test_any_range_reads_back_from_any_world_size(
    tmp_path_factory: pytest.TempPathFactory, world_size: int, data: st.DataObject
) -> None:
    numel = data.draw(st.integers(12, 300))
    layout: Kind = data.draw(st.sampled_from(("flat", "sharded")))
    folder = write_checkpoint(
        tmp_path_factory.mktemp("run"), world_size=world_size, numel=numel, layout=layout
    )
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    reader = CheckpointReader(folder)
    for state in STATES:
        assert np.array_equal(
            reader.read("decay", state, start, end), flat_state("decay", state, numel)[start:end]
        )
    assert np.array_equal(reader.parameter("v"), flat_state("decay", "master", numel)[numel - 11 :])
    assert reader.parameter("w").shape == (numel - 11, 1)


def test_reader_reads_only_the_chunks_that_it_needs(tmp_path: Path) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path, world_size=2, numel=4000))
    reader.read("decay", "exp_avg", 100, 116)
    assert 0 < reader.bytes_read <= 2 * CHUNK_BYTES


def test_safetensors_library_reads_a_rank_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, world_size=2)
    with safe_open(folder / "rank-00001.safetensors", framework="numpy") as file:
        assert np.array_equal(file.get_tensor("decay.exp_avg"), flat_state("decay", "exp_avg", 101)[51:])
        assert "chunk_checksums" in file.keys()  # noqa: SIM118 - not a dict


def test_intact_checkpoint_verifies(tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        folder = write_checkpoint(tmp_path / str(world_size), world_size=world_size)
        assert list(verify(folder)) == []


@pytest.mark.parametrize(
    ("flips", "cuts"), [(1000, 200), pytest.param(10_000, 1000, marks=pytest.mark.chaos)]
)
def test_every_flipped_bit_and_every_truncation_is_detected_and_named(
    tmp_path: Path, flips: int, cuts: int
) -> None:
    folder = write_checkpoint(tmp_path)
    chance = random.Random(0)
    paths = sorted(folder.iterdir())
    for number in range(flips + cuts):
        path = paths[number % len(paths)]
        content = path.read_bytes()
        position = chance.randrange(len(content))
        flipped = bytes([content[position] ^ (1 << chance.randrange(8))])
        is_flip = number < flips
        path.write_bytes(
            content[:position] + flipped + content[position + 1 :] if is_flip else content[:position]
        )
        found = list(verify(folder))
        assert found, f"byte {position} of {path.name}"
        assert found[0].path == path
        path.write_bytes(content)
    assert [list(verify(folder)) for _ in range(100)] == [[]] * 100


def test_read_of_a_corrupt_chunk_names_file_and_byte(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, world_size=1, numel=400)
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + 5 * CHUNK_BYTES + 3] ^= 1
    path.write_bytes(content)
    reader = CheckpointReader(folder)
    reader.read("decay", "master", 0, 5 * CHUNK_BYTES // 4)
    with pytest.raises(Corrupt, match=rf"rank-00000.safetensors: byte {header + 5 * CHUNK_BYTES}: checksum"):
        reader.read("decay", "master", 0, 6 * CHUNK_BYTES // 4)


def test_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "rank-00002.safetensors").unlink()
    assert [(bad.path.name, bad.reason) for bad in verify(folder)] == [("rank-00002.safetensors", "missing")]
    (folder / INDEX_NAME).unlink()
    assert [(bad.path.name, bad.reason) for bad in verify(folder)] == [(INDEX_NAME, "missing")]


def test_index_with_a_path_outside_the_folder_is_refused(tmp_path: Path) -> None:
    index = read_index(write_checkpoint(tmp_path, world_size=1))
    entry = index.files[0].model_copy(update={"name": "../rank-00000.safetensors"})
    (tmp_path / "step-00000007" / INDEX_NAME).write_bytes(
        index.model_copy(update={"files": (entry,)}).dumps()
    )
    with pytest.raises(Corrupt, match="not a readable index"):
        read_index(tmp_path / "step-00000007")


@given(
    content=st.binary(max_size=200)
    | st.from_type(dict).map(lambda d: json.dumps({str(k): 1 for k in d}).encode())
)
def test_hostile_index_raises_corrupt(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / INDEX_NAME).write_bytes(content)
    with pytest.raises(Corrupt):
        read_index(folder)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=True),
    st.sampled_from(
        ["", "../../etc/passwd", "/etc/passwd", "rank-00000.safetensors", "decay", "a" * 5000, "\0"]
    ),
    st.lists(st.integers(-1, 2**70), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_hostile_index_with_a_valid_checksum_raises_corrupt(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("hostile"), world_size=2)
    outside = {path.name for path in folder.parent.iterdir()}
    content = json.loads((folder / INDEX_NAME).read_text())
    del content["checksum"]
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = content
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
            if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
                place[key] = data.draw(HOSTILE)
                break
            place = place[key]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=1).encode() + b"\n")
    (folder / INDEX_NAME).write_text(json.dumps({**content, "checksum": checksum}, indent=1) + "\n")
    list(
        verify(folder)
    )  # whatever it finds, it raises no other exception and allocates no more than the files hold
    try:
        reader = CheckpointReader(folder)
        for entry in reader.index.parameters:
            reader.parameter(entry.name)
    except (Corrupt, CheckpointError):
        pass
    assert {path.name for path in folder.parent.iterdir()} == outside


@pytest.mark.parametrize(
    "hostile",
    [
        {"optimizer_steps": 10**30},
        {"step": 10**40},
        {"skipped": [[5, 2]]},
        {"stage": 77},
        {"parameters": [{"name": "w", "shape": [10**4200] * 3000, "group": "decay", "offset": 0}]},
        {"parameters": [{"name": "w", "shape": [1], "group": "nobody", "offset": 0}]},
        {"step": 8},
    ],
)
def test_index_with_impossible_values_is_corrupt(tmp_path: Path, hostile: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path, world_size=2)
    content = json.loads((folder / INDEX_NAME).read_text()) | hostile
    del content["checksum"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=1).encode() + b"\n")
    (folder / INDEX_NAME).write_text(json.dumps({**content, "checksum": checksum}, indent=1) + "\n")
    with pytest.raises(Corrupt):
        read_index(folder)


def test_index_with_two_groups_of_the_same_name_is_corrupt(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    index = read_index(folder)
    doubled = index.model_copy(update={"groups": (*index.groups, index.groups[0])})
    (folder / INDEX_NAME).write_bytes(doubled.dumps())
    with pytest.raises(Corrupt, match="two groups have the same name"):
        read_index(folder)


def test_checkpoint_in_a_folder_for_another_step_is_corrupt(
    tmp_path: Path,
) -> None:
    moved = write_checkpoint(tmp_path, step=7).rename(tmp_path / "step-00000030")
    with pytest.raises(Corrupt, match="is the checkpoint of step 7, in a folder for step 30"):
        read_index(moved)
    (tmp_path / "step-00000099").touch()
    (tmp_path / "step-000000030").mkdir()
    assert committed(tmp_path) == [(30, moved)]


def test_state_larger_than_its_files_is_refused_before_allocation(tmp_path: Path) -> None:
    index = read_index(write_checkpoint(tmp_path, world_size=1))
    huge = 2**50
    group = index.groups[0].model_copy(update={"numel": huge, "partition_numel": huge})
    parameter = ParameterEntry(name="w", shape=(huge,), group="decay", offset=0)
    index = index.model_copy(update={"groups": (group,), "parameters": (parameter,)})
    (tmp_path / "step-00000007" / INDEX_NAME).write_bytes(index.dumps())
    with pytest.raises(Corrupt, match="bytes instead of"):
        CheckpointReader(tmp_path / "step-00000007").parameter("w")


def test_only_renamed_folders_count_and_leftovers_are_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, step=7)
    temporary_folder(tmp_path, attempt=2, step=8).mkdir()
    assert [step for step, _ in committed(tmp_path)] == [7]
    remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000007"]


def test_prune_keeps_the_given_steps(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write_checkpoint(tmp_path, step=step)
    assert prune(tmp_path, keep={15, 20}) == [5, 10]
    assert [step for step, _ in committed(tmp_path)] == [15, 20]


def test_second_save_of_a_step_rejects_the_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, step=7)
    write_checkpoint(tmp_path, step=7)
    assert [step for step, _ in committed(tmp_path)] == [7]
    assert len(list(tmp_path.glob(".bad-step-00000007-*"))) == 1


def test_index_size_does_not_grow_with_parameters_times_ranks(tmp_path: Path) -> None:
    few, many = (
        len((write_checkpoint(tmp_path / str(w), world_size=w) / INDEX_NAME).read_bytes()) for w in (2, 42)
    )
    assert many - few < 40 * 150  # one line a rank


def rewritten(folder: Path, **fields: Any) -> None:
    """Change fields of the index in `folder`, whose checksum is then right again."""
    content = json.loads((folder / INDEX_NAME).read_text()) | fields
    del content["checksum"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=1).encode() + b"\n")
    (folder / INDEX_NAME).write_text(json.dumps({**content, "checksum": checksum}, indent=1) + "\n")


def test_an_index_of_many_groups_or_files_is_checked_in_linear_time(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, world_size=1)
    content = json.loads((folder / INDEX_NAME).read_text())
    group, parameter, file = content["groups"][0], content["parameters"][0], content["files"][0]

    def of_groups(count: int) -> dict[str, Any]:
        one = {"numel": 1, "partition_numel": 1}
        names = [f"g{number}" for number in range(count)]
        return {
            "groups": [{**group, **one, "name": name} for name in names],
            "parameters": [{**parameter, "name": name, "group": name, "shape": [1]} for name in names],
        }

    rewritten(folder, **of_groups(4097))
    assert "groups: Tuple should have at most 4096 items" in next(verify(folder)).reason
    # The products of groups and parameters, or of ranks and parameters, would take minutes.
    rewritten(folder, **of_groups(2000))
    started = time.process_time()
    assert next(verify(folder)).path.name == rank_name(0)
    sizes = range(1, 2001)
    rewritten(
        folder,
        world_size=5000,
        layout="sharded",
        groups=[{**group, "numel": sum(sizes)}],
        parameters=[
            {**parameter, "name": f"p{size}", "shape": [size], "offset": sum(range(size))} for size in sizes
        ],
        files=[{**file, "name": rank_name(rank)} for rank in range(5000)],
    )
    assert len(list(verify(folder))) == 5000
    assert time.process_time() - started < 3
