"""Exact copies are left out and the first of each stays, however the preparation was run."""

import random
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.chunk import Chunk
from data_pipeline.prepare.encode import EncodeSettings
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.progress import Advance, Progress
from data_pipeline.prepare.worker_pool import Task, encode_all
from data_pipeline.tokenizer.encoding import load_encoding
from tests.unit.data_pipeline.support import config, documents_of, files_of, packaged_texts, write_jsonl

SMALL = {"shard_tokens": 2_000, "val_fraction": 0, "deduplicate": True}


@pytest.fixture
def texts() -> list[str]:
    """Every document one to four times, shuffled."""
    choose = random.Random(3)
    verses = [verse for chapter in packaged_texts()[:20] for verse in chapter.split("\n") if verse]
    texts = [verse for verse in dict.fromkeys(verses) for _ in range(choose.randrange(1, 5))]
    choose.shuffle(texts)
    return texts


def _texts(out: Path) -> list[str]:
    encoding = load_encoding(out)
    return [encoding.decode(ids[:-1].tolist()) for ids in documents_of(out, "train")]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_equal_documents_stays(
    tmp_path: Path, texts: list[str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.dedup.BUCKET_BYTES", 5000)  # many buckets
    half = len(texts) // 2
    first = write_jsonl(tmp_path / "a.jsonl", [*texts[:half], "", ""])
    second = write_jsonl(tmp_path / "b.jsonl", [None, *texts[half:]])
    manifest = prepare(config(tmp_path / "data", first, second, **SMALL, workers=workers, on_bad="skip"))
    assert _texts(tmp_path / "data") == list(dict.fromkeys(texts))
    assert manifest.skipped == {
        "'text' is null": 1,
        "an exact copy of an earlier one": len(texts) - len(set(texts)),
        "empty": 2,
    }
    assert manifest.documents == len(set(texts))


def test_the_result_does_not_depend_on_the_number_of_workers_or_a_kill(
    tmp_path: Path, texts: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(config(tmp_path / "one", source, **SMALL))
    prepare(config(tmp_path / "two", source, **SMALL, workers=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")

    class Killed(BaseException):
        pass

    for chunks in (0, 1, 5):

        def stop(progress: Progress, chunks: int = chunks) -> None:
            done = len(list((tmp_path / "killed" / ".prepare").glob("[0-9a-f]*/piece.json")))
            if done >= chunks and progress.message is None:
                raise Killed

        with pytest.raises(Killed):
            prepare(config(tmp_path / "killed", source, **SMALL), stop)
    prepare(config(tmp_path / "killed", source, **SMALL))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "killed")


def test_a_chunk_is_encoded_again_if_its_copies_have_changed(tmp_path: Path, texts: list[str]) -> None:
    """The first source changes between two runs, so a document of the second one becomes a copy."""
    out = tmp_path / "data"
    early = write_jsonl(tmp_path / "a.jsonl", [*texts[:50], 5])
    late = write_jsonl(tmp_path / "b.jsonl", texts[50:])
    with pytest.raises(Exception, match="broken documents"):
        prepare(config(out, early, late, **SMALL))
    write_jsonl(early, [*texts[:50], texts[-1]])
    prepare(config(out, early, late, **SMALL))
    assert _texts(out) == list(dict.fromkeys([*texts[:50], texts[-1], *texts[50:]]))


def test_a_source_that_changes_between_the_passes_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["twice and again"] * 2)

    def encode(
        folder: Path,
        chunks: Sequence[Chunk],
        settings: EncodeSettings,
        workers: int,
        /,
        task: Task = "encode",
    ) -> Generator[Advance | Chunk, None, None]:
        if task == "encode":
            lines = [b'{"text":"%d"}' % number for number in range(3)]  # more lines in no more bytes
            source.write_bytes(b"\n".join(lines)[: source.stat().st_size])
        return encode_all(folder, chunks, settings, workers, task)

    settings = config(tmp_path / "data", source, val_fraction=0, deduplicate=True)
    with pytest.raises(DataError, match=r"a\.jsonl: it changed while it was being prepared"):
        prepare(settings, encode=encode)


def test_copies_stay_by_default(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["twice", "twice"])
    manifest = prepare(config(tmp_path / "data", source, val_fraction=0))
    assert manifest.documents == 2
    with pytest.raises(ConfigError, match="deduplicate = False, now True"):
        prepare(config(tmp_path / "data", source, val_fraction=0, deduplicate=True))
    assert np.array_equal(*documents_of(tmp_path / "data", "train"))
