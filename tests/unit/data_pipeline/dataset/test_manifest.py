import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.integrity import check, verify
from data_pipeline.dataset.manifest import BLOCK_BYTES, read_manifest
from data_pipeline.dataset.megatron_index import HEADER, read_header
from data_pipeline.errors import DataError
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.evaluation import EvaluationReader
from tests.unit.data_pipeline.support import packaged_texts, prepared

DATA_FILES = ["encoding.json", "manifest.json"] + [
    f"{split}-00000.{kind}" for split in ("train", "val") for kind in ("bin", "idx", "sum")
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "data"
    prepared(out, packaged_texts()[:40], val_fraction=0.3)
    return out


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def _rewrite(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a right checksum, as somebody hostile would."""
    content = json.loads((data / "manifest.json").read_bytes())
    del content["sha256"]
    change(content)
    rest = (json.dumps(content, indent=1)[2:] + "\n").encode()
    first_line = b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
    (data / "manifest.json").write_bytes(first_line + rest)


def test_an_intact_data_set_has_no_problem_and_may_be_moved(data: Path) -> None:
    assert sorted(path.name for path in data.iterdir()) == sorted(DATA_FILES)
    moved = data.rename(data.parent / "moved")
    assert check(moved, read_manifest(moved)) == []
    assert list(verify(moved)) == []
    assert str(data.parent).encode() not in (moved / "manifest.json").read_bytes()


def test_the_manifest_counts_and_checksums_what_is_there(data: Path) -> None:
    manifest = read_manifest(data)
    assert manifest.documents == 40
    (train,), (val,) = manifest.train, manifest.val
    assert manifest.train_tokens == train.tokens == (data / "train-00000.bin").stat().st_size // 2
    assert manifest.val_tokens == val.tokens == (data / "val-00000.bin").stat().st_size // 2
    for name, record in (train.files | val.files).items():
        raw = (data / name).read_bytes()
        assert (record.size_bytes, record.xxh3_128) == (len(raw), xxhash.xxh3_128_hexdigest(raw))
    sums = json.loads((data / "train-00000.sum").read_bytes())
    assert sums["bin"] == [train.bin.xxh3_128], "one chunk"


@pytest.mark.parametrize("name", DATA_FILES)
def test_any_flipped_bit_is_found_and_its_file_named(data: Path, name: str) -> None:
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
def test_any_truncation_is_found_and_its_file_named(data: Path, name: str) -> None:
    path = data / name
    raw = path.read_bytes()
    for size in sorted({0, 1, len(raw) // 2, len(raw) - 1}):
        path.write_bytes(raw[:size])
        assert [file.path for file in verify(data)] == [path]
        if name != "manifest.json":
            (problem,) = check(data, read_manifest(data))
            assert problem.startswith(str(path))


@pytest.mark.parametrize("name", [name for name in DATA_FILES if name != "manifest.json"])
def test_a_missing_or_longer_file_is_named(data: Path, name: str) -> None:
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


def test_verify_names_the_first_bad_chunk_of_a_large_file(tmp_path: Path) -> None:
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
    # without the chunks' checksums the file is still found, by the manifest's
    (data / "train-00000.sum").unlink()
    assert [(file.path.name, file.offset) for file in verify(data)] == [
        ("train-00000.sum", 0),
        ("train-00000.bin", 0),
    ]


def test_a_replaced_encoding_is_named(data: Path) -> None:
    raw = (data / "encoding.json").read_bytes()
    (data / "encoding.json").write_bytes(raw.replace(b'"outlast-4k"', b'"outlast-5k"'))
    (problem,) = check(data, read_manifest(data))
    assert problem == (
        f"{data / 'encoding.json'}: not the encoding that the shards were made with: its bytes changed"
    )


def test_an_index_of_another_kind_is_named(data: Path) -> None:
    path = data / "train-00000.idx"
    raw = path.read_bytes()
    magic, version, code, sequences, boundaries = HEADER.unpack(raw[: HEADER.size])
    bodies = {
        "it begins with b'NOTANIDX": (b"NOTANIDX!", version, code, sequences, boundaries),
        "an index of version 2 with dtype code 8": (magic, 2, code, sequences, boundaries),
        "with dtype code 5": (magic, version, 5, sequences, boundaries),
        "and 0 document boundaries": (magic, version, code, sequences, 0),
        "its header speaks of": (magic, version, code, sequences - 2, boundaries + 3),
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


def test_a_truncated_shard_is_named_when_a_reader_opens(data: Path) -> None:
    for name in ("train-00000.bin", "val-00000.bin"):
        raw = (data / name).read_bytes()
        (data / name).write_bytes(raw[:-2])
        with pytest.raises(DataError, match=rf"{name}: {len(raw) - 2} bytes, should be {len(raw)}"):
            if name.startswith("train"):
                BatchReader([(data, 1.0)], context=16, global_batch=1, seed=0)
            else:
                EvaluationReader(data, context=16, tokens=10, document_mask=True)


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a data set, .* there is no such folder"):
        read_manifest(tmp_path / "nowhere")
    for attempt in (read_manifest, lambda folder: list(verify(folder))):
        with pytest.raises(DataError, match=r"its preparation did not finish: it has no manifest\.json"):
            attempt(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read: Is a directory"):
        read_manifest(tmp_path)


def test_a_manifest_that_was_changed_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(DataError, match=r"manifest\.json: its checksum does not match"):
        read_manifest(data)
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest: the first line must hold"):
        read_manifest(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "format 2; this version reads format 1"),
        (lambda m: m.update(dtype="float32"), "malformed: ValueError dtype 'float32'"),
        (lambda m: m.pop("train"), "malformed: KeyError 'train'"),
        (lambda m: m["train"][0].update(name="../../etc/passwd"), "is not a plain file name"),
        (lambda m: m["train"][0].update(name="/etc/passwd"), "is not a plain file name"),
        (lambda m: m["train"][0].update(name=".."), "is not a plain file name"),
        (lambda m: m["train"][0].update(name=7), "is not a plain file name"),
        (lambda m: m["train"][0].update(tokens=-1), "-1 is not a count"),
        (lambda m: m["train"][0].update(tokens=True), "True is not a count"),
        (lambda m: m["train"][0].update(tokens=10**30), "is not a count"),
        (lambda m: m["train"][0].update(tokens=5), "5 tokens do not make"),
        (lambda m: m["train"][0]["bin"].update(xxh3_128="../x"), "checksum '../x'"),
        (lambda m: m["train"][0]["bin"].update(extra=1), "malformed: TypeError"),
        (lambda m: m["train"].append(m["train"][0]), "two shards of one name"),
        (lambda m: m["encoding"].update(vocab_size="many"), "'many' is not a count"),
    ],
)
def test_a_hostile_manifest_is_refused(
    data: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    _rewrite(data, change)
    with pytest.raises(DataError, match=r"manifest\.json: ") as error:
        read_manifest(data)
    assert words in str(error.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data_set=st.data())
@settings(max_examples=200, deadline=None)
def test_a_manifest_with_anything_anywhere_is_read_or_refused_cleanly(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data_set: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(original / "manifest.json", folder)

    def replace_something(content: dict[str, Any]) -> None:
        where: Any = content
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            key = data_set.draw(st.sampled_from(keys))
            if isinstance(where[key], dict | list) and where[key] and data_set.draw(st.booleans()):
                where = where[key]
                continue
            where[key] = data_set.draw(_JSON)
            return

    _rewrite(folder, replace_something)
    try:
        manifest = read_manifest(folder)
        assert manifest.fingerprint
        list(verify(folder))
    except DataError as error:
        assert "manifest.json" in str(error)


def test_the_data_fingerprint_is_of_the_tokens_and_not_of_how_they_came_to_be(tmp_path: Path) -> None:
    texts = packaged_texts()[:10]
    first = prepared(tmp_path / "first", texts, val_fraction=0)
    same = prepared(tmp_path / "same", [*texts, ""], val_fraction=0)
    other = prepared(tmp_path / "other", texts[::-1], val_fraction=0)
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != other.fingerprint


def test_reading_needs_numpy_alone(data: Path) -> None:
    program = f"""
import sys
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
before = {{file.partition("site-packages/")[2].partition("/")[0] for file in files}}
from pathlib import Path
from data_pipeline.dataset.manifest import read_manifest
read_manifest(Path({str(data)!r}))
assert "numpy" not in sys.modules
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.evaluation import EvaluationReader
reader = BatchReader([(Path({str(data)!r}), 1.0)], context=16, global_batch=2, seed=0)
reader.batch(1, 0, 1)
EvaluationReader(Path({str(data)!r}), context=16, tokens=100, document_mask=True).windows(0, 1)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print(sorted({{file.partition("site-packages/")[2].partition("/")[0] for file in files}} - before))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['numpy']"
