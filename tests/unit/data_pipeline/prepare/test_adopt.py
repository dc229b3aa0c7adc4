"""Existing Megatron files become a data set."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from data_pipeline.dataset.integrity import verify
from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.dataset.megatron_index import Header
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.adopt import adopt
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from launcher.cli import commands
from tests.unit.data_pipeline.tokenizer.support import write_rank_file


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """The .bin and .idx files alone, under Megatron's names."""
    folder = tmp_path / "megatron"
    folder.mkdir()
    for name in ("train-00000", "train-00001", "val-00000"):
        for kind in ("bin", "idx"):
            shutil.copy(made / f"{name}.{kind}", folder / f"{name}_text_document.{kind}")
    return folder


def _prefix(folder: Path, name: str) -> str:
    return str(folder / f"{name}_text_document")


def _adopt(folder: Path, *names: str, tokenizer: str = "outlast-4k") -> None:
    adopt([_prefix(folder, name) for name in names or ("train-00000",)], [], tokenizer)


def test_adopted_files_become_a_data_set_and_stay_unchanged(made: Path, files: Path) -> None:
    before = {path: path.read_bytes() for path in files.iterdir()}
    folder, manifest = adopt(
        [_prefix(files, "train-00001"), f"{_prefix(files, 'train-00000')}.bin"],
        [_prefix(files, "val-00000")],
        "outlast-4k",
    )
    assert folder == files
    assert {path: path.read_bytes() for path in before} == before
    assert list(verify(files)) == []
    assert read_manifest(files) == manifest
    assert manifest.is_ended_by_token
    original = read_manifest(made)
    assert [shard.bin for shard in manifest.train] == [original.train[1].bin, original.train[0].bin]
    assert [shard.sum for shard in manifest.val] == [original.val[0].sum]
    reader = BatchReader([(files, 1.0)], context=64, global_batch=4, seed=1)
    assert reader.tokens == original.train[0].tokens + original.train[1].tokens
    assert reader.batch(1, 0, 1).tokens.shape == (4, 65)


def test_damage_to_adopted_files_is_detected(files: Path) -> None:
    _adopt(files)
    path = files / "train-00000_text_document.bin"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    (bad,) = verify(files)
    assert bad.path == path


def test_documents_without_end_of_text_are_reported(files: Path) -> None:
    path = files / "train-00000_text_document.bin"
    ids = np.fromfile(path, np.uint16)
    ids[ids == 4095] = 7
    ids.tofile(path)
    warnings: list[str] = []
    adopt([_prefix(files, "train-00000")], [], "outlast-4k", warn=warnings.append)
    assert not read_manifest(files).is_ended_by_token
    count = read_manifest(files).train[0].documents
    assert warnings == [
        f"{count} documents do not end with outlast-4k's end-of-text, 4095: they were written without one, "
        f"or with another tokenizer"
    ]


def test_an_end_of_text_inside_a_document_does_not_end_it(files: Path) -> None:
    path = files / "train-00000_text_document.bin"
    ids = np.fromfile(path, np.uint16)
    ids[3] = 4095
    ids.tofile(path)
    _adopt(files)
    assert not read_manifest(files).is_ended_by_token
    reader = BatchReader([(files, 1.0)], context=len(ids) - 1, global_batch=1, seed=1)
    batch = reader.batch(1, 0, 1)
    assert bool(batch.scored[0, 3])
    assert int((~batch.scored).sum()) == read_manifest(files).documents - 1


def test_files_with_ids_of_another_tokenizer_are_refused(files: Path, tmp_path: Path) -> None:
    few = {bytes([value]): value for value in range(256)}
    (tmp_path / "bytes.json").write_bytes(Encoding("bytes", r".", few, {"<|endoftext|>": 256}).to_json())
    with pytest.raises(
        DataError, match=r"contains id \d+, but bytes has only 257 ids: it was written with another"
    ):
        _adopt(files, tokenizer=str(tmp_path / "bytes.json"))
    assert not (files / "manifest.json").exists()


def test_files_that_cannot_be_adopted_are_refused_with_all_reasons(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for kind in ("bin", "idx"):
        shutil.copy(files / f"train-00001_text_document.{kind}", other / f"x.{kind}")
    with pytest.raises(ConfigError) as error:
        adopt([_prefix(files, "none"), _prefix(files, "train-00000"), str(other / "x")], [], "outlast-4k")
    missing_bin, missing_idx, folders = error.value.problems
    assert missing_bin.endswith("none_text_document.bin: no such file; a prefix names NAME.bin and NAME.idx")
    assert missing_idx.endswith("none_text_document.idx: no such file; a prefix names NAME.bin and NAME.idx")
    assert folders == (
        f"the shards of a data set must be in one folder, but these are in several: {files}, {other}. Link "
        f"the files into one folder"
    )
    with pytest.raises(ConfigError, match="two prefixes are equal"):
        _adopt(files, "train-00000", "train-00000")
    _adopt(files)
    with pytest.raises(ConfigError, match=r"already contains a data set: remove its manifest\.json"):
        _adopt(files)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("bin", lambda raw: raw[:-2], r"\d+ bytes, but its index describes \d+ tokens in uint16"),
        ("idx", lambda raw: raw[:-8], r"\d+ bytes, but its header requires \d+: it was truncated"),
        ("idx", lambda raw: b"X" + raw[1:], "not an index of a token shard"),
        ("idx", lambda raw: raw[:-8] + bytes(8), "its documents do not contain every sequence once"),
    ],
)
def test_files_that_their_index_does_not_describe_are_refused(
    files: Path, kind: str, change: object, reason: str
) -> None:
    path = files / f"train-00000_text_document.{kind}"
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=reason):
        _adopt(files)


def test_offsets_with_gaps_are_refused(files: Path) -> None:
    path = files / "train-00000_text_document.idx"
    raw = bytearray(path.read_bytes())
    sequences = int.from_bytes(raw[18:26], "little")
    raw[34 + 4 * sequences + 8] ^= 2
    path.write_bytes(raw)
    with pytest.raises(DataError, match="its sequences are not contiguous"):
        _adopt(files)


def test_the_adopt_command_adopts_and_refuses_conflicting_options(files: Path) -> None:
    run = CliRunner()
    prefix = _prefix(files, "train-00000")
    arguments = ["prepare", "--adopt", prefix, "--tokenizer", "outlast-4k"]
    refused = run.invoke(commands, [*arguments, "--out", "x"], standalone_mode=False)
    assert "cannot be combined with --out" in str(refused.exception)
    refused = run.invoke(commands, arguments[:3], standalone_mode=False)
    assert "--tokenizer must be given" in str(refused.exception)
    refused = run.invoke(commands, ["prepare", "x", "--adopt-val", "y"], standalone_mode=False)
    assert "--adopt-val needs --adopt" in str(refused.exception)
    val = ["--adopt-val", _prefix(files, "val-00000")]
    done = run.invoke(commands, [*arguments, *val], standalone_mode=False)
    assert done.exception is None
    assert done.stdout.splitlines()[-1] == str(files)
    assert len(read_manifest(files).val) == 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_shards_are_read(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)  # root may write anywhere
    monkeypatch.setattr("data_pipeline.prepare.adopt._adopt_shard", lambda *_: pytest.fail("read a shard"))
    with pytest.raises(DataError, match="no file can be created there: Permission denied"):
        _adopt(files)


def test_a_multimodal_index_is_named_as_such(files: Path) -> None:
    path = files / "train-00000_text_document.idx"
    raw = path.read_bytes()
    path.write_bytes(raw + bytes(int.from_bytes(raw[18:26], "little")))
    with pytest.raises(DataError, match="has a mode for each sequence, as multimodal data sets do"):
        _adopt(files)


def test_negative_ids_are_shown_as_they_are(files: Path) -> None:
    path = files / "train-00000_text_document"
    ids = np.fromfile(path.with_suffix(".bin"), np.uint16).astype(np.int32)
    ids[7] = -5
    ids.tofile(path.with_suffix(".bin"))
    raw = bytearray(path.with_suffix(".idx").read_bytes())
    sequences = int.from_bytes(raw[18:26], "little")
    raw[17] = 4  # int32
    start = 34 + 4 * sequences
    raw[start : start + 8 * sequences] = (
        np.frombuffer(raw[start : start + 8 * sequences], "<i8") * 2
    ).tobytes()
    path.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(DataError, match="contains the negative id -5"):
        _adopt(files)


def test_shards_for_training_without_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.bin").touch()
    (tmp_path / "none.idx").write_bytes(Header("uint16", 0, 0).pack() + bytes(8))
    with pytest.raises(DataError, match="the shards for training contain no tokens"):
        _adopt_prefix(tmp_path / "none")
    assert not (tmp_path / "manifest.json").exists()


def test_a_name_that_a_manifest_cannot_give_is_refused(files: Path) -> None:
    for kind in ("bin", "idx"):
        (files / f"train-00000_text_document.{kind}").rename(files / f"donn\xe9es.{kind}")
    with pytest.raises(ConfigError, match="a shard's name consists of ASCII letters"):
        _adopt_prefix(files / "donn\xe9es")


def test_the_pattern_and_end_of_text_of_a_rank_file_can_be_given(files: Path, tmp_path: Path) -> None:
    ranks = write_rank_file(tmp_path / "mine.tiktoken", load_encoding("outlast-4k").ranks)
    arguments = ["prepare", "--adopt", _prefix(files, "train-00000"), "--tokenizer", str(ranks)]
    arguments += ["--end-of-text", "<|end|>=4095", "--set", "tokenizer_pattern=cl100k_base"]
    done = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert done.exception is None
    assert load_encoding(files).end_of_text_token == "<|end|>"


def _adopt_prefix(prefix: Path) -> None:
    adopt([str(prefix)], [], "outlast-4k")
