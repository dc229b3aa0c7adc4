import hashlib
import json
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

from data_pipeline.dataset.integrity import verify
from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.support import packaged_texts, prepared


def _rewrite(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a correct checksum, as an attacker would."""
    content = json.loads((data / "manifest.json").read_bytes())
    del content["sha256"]
    change(content)
    rest = (json.dumps(content, indent=1)[2:] + "\n").encode()
    first_line = b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
    (data / "manifest.json").write_bytes(first_line + rest)


def test_the_manifest_has_the_counts_and_checksums_of_the_files(data: Path) -> None:
    manifest = read_manifest(data)
    assert manifest.documents == 40
    (train,), (val,) = manifest.train, manifest.val
    assert manifest.train_tokens == train.tokens == (data / "train-00000.bin").stat().st_size // 2
    assert manifest.val_tokens == val.tokens == (data / "val-00000.bin").stat().st_size // 2
    for name, record in (train.files | val.files).items():
        raw = (data / name).read_bytes()
        assert (record.size_bytes, record.xxh3_128) == (len(raw), xxhash.xxh3_128_hexdigest(raw))
    sums = json.loads((data / "train-00000.sum").read_bytes())
    assert sums["bin"] == [train.bin.xxh3_128], "the file is one block"


def test_a_folder_without_a_manifest_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a data set, .* no such folder"):
        read_manifest(tmp_path / "nowhere")
    for attempt in (read_manifest, lambda folder: list(verify(folder))):
        with pytest.raises(DataError, match=r"its preparation is unfinished: it has no manifest\.json"):
            attempt(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read: Is a directory"):
        read_manifest(tmp_path)


def test_an_edited_manifest_is_refused(data: Path) -> None:
    path = data / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(DataError, match=r"manifest\.json: its checksum does not match"):
        read_manifest(data)
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest: the first line must contain"):
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
        (lambda m: m["train"][0].update(tokens=5), "5 tokens do not take"),
        (lambda m: m["train"][0]["bin"].update(xxh3_128="../x"), "checksum '../x'"),
        (lambda m: m["train"][0]["bin"].update(extra=1), "malformed: TypeError"),
        (lambda m: m["train"].append(m["train"][0]), "two shards have the same name"),
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
def test_a_manifest_with_any_value_replaced_is_read_or_refused_with_a_data_error(
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


def test_the_fingerprint_depends_on_the_tokens_and_not_on_the_preparation(tmp_path: Path) -> None:
    texts = packaged_texts()[:10]
    first = prepared(tmp_path / "first", texts, val_fraction=0)
    same = prepared(tmp_path / "same", [*texts, ""], val_fraction=0)
    other = prepared(tmp_path / "other", texts[::-1], val_fraction=0)
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != other.fingerprint


def test_reading_a_data_set_needs_only_numpy(data: Path) -> None:
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
    assert _run(program) == "['numpy']"


READ = {
    "manifest": "from data_pipeline.dataset.manifest import read_manifest; read_manifest(data)",
    "integrity": "from data_pipeline.dataset.integrity import verify; list(verify(data))",
    "encoding": "from data_pipeline.tokenizer.encoding import load_encoding; load_encoding(data).encode('a')",
    "batches": "from data_pipeline.sampling.batches import BatchReader; "
    "BatchReader([(data, 1.0)], context=16, global_batch=2, seed=0).batch(1, 0, 1)",
    "evaluation": "from data_pipeline.sampling.evaluation import EvaluationReader; "
    "EvaluationReader(data, context=16, tokens=100, document_mask=True).windows(0, 1)",
}


@pytest.mark.parametrize("reader", READ)
def test_readers_of_a_data_set_load_no_parser_of_raw_text(data: Path, reader: str) -> None:
    program = f"""
import sys
from pathlib import Path
data = Path({str(data)!r})
{READ[reader]}
parsers = ("data_pipeline.sources", "data_pipeline.prepare", "data_pipeline.tokenizer.train")
print([name for name in sys.modules if name.startswith((*parsers, "orjson", "pyarrow", "zstandard"))])
"""
    assert _run(program) == "[]"


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()
