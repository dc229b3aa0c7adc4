import random
from pathlib import Path

import pytest

from data_pipeline.dataset.integrity import check, verify
from data_pipeline.dataset.manifest import BLOCK_BYTES, read_manifest
from data_pipeline.dataset.megatron_index import HEADER, read_header
from data_pipeline.errors import DataError
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.evaluation import EvaluationReader
from tests.unit.data_pipeline.support import prepared

DATA_FILES = ["encoding.json", "manifest.json"] + [
    f"{split}-00000.{kind}" for split in ("train", "val") for kind in ("bin", "idx", "sum")
]


def test_an_intact_data_set_has_no_problems_and_can_be_moved(data: Path) -> None:
    assert sorted(path.name for path in data.iterdir()) == sorted(DATA_FILES)
    moved = data.rename(data.parent / "moved")
    assert check(moved, read_manifest(moved)) == []
    assert list(verify(moved)) == []
    assert str(data.parent).encode() not in (moved / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", DATA_FILES)
def test_any_flipped_bit_is_detected_in_its_file(data: Path, name: str) -> None:
    path = data / name
    raw = path.read_bytes()
    choose = random.Random(name)
    for _ in range(60):
        place, bit = choose.randrange(len(raw)), choose.randrange(8)
        flipped = bytearray(raw)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        bad = list(verify(data))
        assert [file.path for file in bad] == [path], f"byte {place}, bit {bit}"
        assert bad[0].offset <= place
    path.write_bytes(raw)
    assert list(verify(data)) == []


@pytest.mark.parametrize("name", DATA_FILES)
def test_any_truncation_is_detected_in_its_file(data: Path, name: str) -> None:
    path = data / name
    raw = path.read_bytes()
    for size in sorted({0, 1, len(raw) // 2, len(raw) - 1}):
        path.write_bytes(raw[:size])
        assert [file.path for file in verify(data)] == [path]
        if name != "manifest.json":
            (problem,) = check(data, read_manifest(data))
            assert problem.startswith(str(path))


@pytest.mark.parametrize("name", [name for name in DATA_FILES if name != "manifest.json"])
def test_a_missing_or_longer_file_is_detected(data: Path, name: str) -> None:
    path = data / name
    raw = path.read_bytes()
    path.write_bytes(raw + b"x")
    assert [(file.path, file.reason) for file in verify(data)] == [
        (path, f"{len(raw) + 1} bytes, should be {len(raw)}")
    ]
    path.unlink()
    assert [(file.path, file.offset, file.reason) for file in verify(data)] == [(path, 0, "missing")]
    (problem,) = check(data, read_manifest(data))
    assert problem.startswith(str(path))
    assert problem.endswith("missing")


def test_verify_reports_the_first_bad_block_of_a_large_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepared(data, ["word " * 4_500_000], val_fraction=0)
    path = data / "train-00000.bin"
    raw = bytearray(path.read_bytes())
    assert len(raw) > 2 * BLOCK_BYTES
    raw[BLOCK_BYTES + 5] ^= 1
    raw[2 * BLOCK_BYTES + 5] ^= 1
    path.write_bytes(raw)
    (bad,) = verify(data)
    assert bad == (path, BLOCK_BYTES, f"its bytes changed (within {BLOCK_BYTES} bytes)")
    # without the checksums of the blocks, the manifest's checksum still detects the file
    (data / "train-00000.sum").unlink()
    assert [(file.path.name, file.offset) for file in verify(data)] == [
        ("train-00000.sum", 0),
        ("train-00000.bin", 0),
    ]


def test_a_replaced_encoding_is_detected(data: Path) -> None:
    raw = (data / "encoding.json").read_bytes()
    (data / "encoding.json").write_bytes(raw.replace(b'"outlast-4k"', b'"outlast-5k"'))
    (problem,) = check(data, read_manifest(data))
    assert problem == (
        f"{data / 'encoding.json'}: not the encoding that the shards were made with: its bytes changed"
    )


def test_an_index_of_another_kind_is_detected(data: Path) -> None:
    path = data / "train-00000.idx"
    raw = path.read_bytes()
    magic, version, code, sequences, boundaries = HEADER.unpack(raw[: HEADER.size])
    bodies = {
        "it begins with b'NOTANIDX": (b"NOTANIDX!", version, code, sequences, boundaries),
        "an index of version 2 with dtype code 8": (magic, 2, code, sequences, boundaries),
        "with dtype code 5": (magic, version, 5, sequences, boundaries),
        "and 0 document boundaries": (magic, version, code, sequences, 0),
        "its header describes": (magic, version, code, sequences - 2, boundaries + 3),
        "documents in int32": (magic, version, 4, sequences, boundaries),
    }
    for words, header in bodies.items():
        path.write_bytes(HEADER.pack(*header) + raw[HEADER.size :])
        (problem,) = check(data, read_manifest(data))
        assert problem.startswith(f"{path}: ")
        assert words in problem
        with pytest.raises(DataError, match=r"train-00000\.idx"):
            BatchReader([(data, 1.0)], context=16, global_batch=1, seed=0)
    path.write_bytes(raw[:20])
    with pytest.raises(DataError, match=r"train-00000\.idx: 20 bytes, too short for an index"):
        read_header(path)
    with pytest.raises(DataError, match=r"none\.idx: cannot be read: No such file"):
        read_header(data / "none.idx")


def test_opening_a_reader_detects_a_truncated_shard(data: Path) -> None:
    for name in ("train-00000.bin", "val-00000.bin"):
        raw = (data / name).read_bytes()
        (data / name).write_bytes(raw[:-2])
        with pytest.raises(DataError, match=rf"{name}: {len(raw) - 2} bytes, should be {len(raw)}"):
            if name.startswith("train"):
                BatchReader([(data, 1.0)], context=16, global_batch=1, seed=0)
            else:
                EvaluationReader(data, context=16, tokens=10, document_mask=True)
