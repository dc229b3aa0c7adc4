import fcntl
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset.integrity import check, verify
from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.dataset.megatron_index import dtype_for
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.progress import Progress
from data_pipeline.prepare.worker_pool import encode_all
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from data_pipeline.tokenizer.fast_encoder import EncoderChoice, FlatIds, TiktokenEncoder
from gpt.run.exit_codes import exit_code_of
from tests.paths import ROOT
from tests.unit.data_pipeline.support import (
    config,
    documents_of,
    files_of,
    packaged_texts,
    prepared,
    write_jsonl,
)

# Small shards make many chunks of a small corpus.
SMALL = {"shard_tokens": 10_000, "val_fraction": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "data"
    prepare(config(out, raw, **SMALL))
    return files_of(out)


def test_every_document_is_in_its_split_in_order_and_ends_with_end_of_text(raw: Path, tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path / "data", raw, **SMALL))
    encoding = load_encoding("outlast-4k")
    texts = packaged_texts()
    inputs = [*texts[:400], texts[500], *texts[600:700], *texts[400:420]]  # by path: a, c, e, sub/b
    for split in ("train", "val"):
        wanted = [text for text in inputs if is_held_out(text.encode(), 0.1, 0) == (split == "val")]
        found = documents_of(tmp_path / "data", split)
        assert len(found) == len(wanted)
        for ids, text in zip(found, wanted, strict=True):
            assert ids[-1] == encoding.end_of_text
            assert np.array_equal(ids[:-1], encoding.encode(text))
    assert manifest.skipped == {"empty": 2}
    assert manifest.documents == len(inputs)
    assert [source["name"] for source in manifest.sources] == [
        f"{raw.name}/{name}" for name in ("a.jsonl", "c.txt", "d.txt", "e.jsonl.gz", "sub/b.jsonl")
    ]
    assert check(tmp_path / "data", manifest) == []
    assert list(verify(tmp_path / "data")) == []
    assert max(shard.tokens for shard in manifest.train) < 20_000


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    raw: Path, tmp_path: Path, uninterrupted: dict[str, bytes], workers: int
) -> None:
    prepare(config(tmp_path / "data", raw, **SMALL, workers=workers))
    assert files_of(tmp_path / "data") == uninterrupted


_PREPARE = """
import sys
from pathlib import Path
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
if __name__ == "__main__":
    prepare(DataPrepConfig.model_validate_json(sys.argv[1]), lambda p: print(p.bytes_done, flush=True))
"""


def _start(settings_json: str, program: Path) -> subprocess.Popen[bytes]:
    program.write_text(_PREPARE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(program), settings_json],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def _session(leader: int) -> list[int]:
    """The processes of a session that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_a_preparation_killed_at_random_moments_continues_with_the_same_bytes(
    raw: Path, tmp_path: Path, uninterrupted: dict[str, bytes], seed: int
) -> None:
    out = tmp_path / "data"
    settings = config(out, raw, **SMALL, workers=2).model_dump_json()
    choose = random.Random(seed)
    kills, longest_s = 0, 0.25
    while kills < 4:
        process = _start(settings, tmp_path / "program.py")
        assert process.stdout is not None
        process.stdout.readline()  # the first chunk is being encoded
        time.sleep(choose.uniform(0, longest_s))
        if process.poll() is not None:  # it ended before the kill: start over, and kill earlier
            shutil.rmtree(out)
            longest_s /= 2
            continue
        process.kill()
        process.wait()
        kills += 1
        assert not (out / "manifest.json").exists() or list(verify(out)) == []
        for _ in range(100):
            if not _session(process.pid):
                break
            time.sleep(0.1)
        else:
            pytest.fail("workers are still running after their preparation was killed")
    process = _start(settings, tmp_path / "program.py")
    process.communicate()
    assert process.returncode == 0
    assert files_of(out) == uninterrupted


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(10, 16))
def test_a_preparation_killed_many_more_times_continues_with_the_same_bytes(
    raw: Path, tmp_path: Path, uninterrupted: dict[str, bytes], seed: int
) -> None:
    test_a_preparation_killed_at_random_moments_continues_with_the_same_bytes(
        raw, tmp_path, uninterrupted, seed
    )


class _Killed(BaseException):
    """Ends a preparation as a kill does: no code catches it."""


@pytest.mark.parametrize("renames", [0, 1, 30, 100, -1])
def test_a_preparation_killed_between_the_final_renames_continues_with_the_same_bytes(
    raw: Path, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    out = tmp_path / "data"
    done = 0
    rename = Path.rename

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        if target.parent == out and (done == renames or (renames == -1 and target.name == "manifest.json")):
            raise _Killed
        done += target.parent == out
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(_Killed):
        prepare(config(out, raw, **SMALL))
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    prepare(config(out, raw, **SMALL))
    assert files_of(out) == uninterrupted


def test_a_preparation_killed_before_the_cleanup_is_cleaned_up(
    raw: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out = tmp_path / "data"
    prepare(config(out, raw, **SMALL))
    (out / ".prepare").mkdir()
    (out / ".prepare" / "names.json").write_text("{}")
    prepare(config(out, raw, **SMALL))
    assert files_of(out) == uninterrupted


def test_a_preparation_continues_after_its_committed_chunks(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    work = out / ".prepare"
    seen: list[Progress] = []

    def stop_later(_: Progress) -> None:
        if len(list(work.glob("[0-9a-f]*/piece.json"))) >= 5:
            raise _Killed

    with pytest.raises(_Killed):
        prepare(config(out, raw, **SMALL), stop_later)
    (work / ".incomplete.123").mkdir()
    before = {path: path.stat().st_mtime_ns for path in work.glob("[0-9a-f]*/piece.json")}
    assert len(before) == 5

    def check_progress(progress: Progress) -> None:
        seen.append(progress)
        if (work / "names.json").exists():
            return
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert not (work / ".incomplete.123").exists()

    prepare(config(out, raw, **SMALL), check_progress)
    messages = [progress.message for progress in seen if progress.message]
    assert len(messages) == 1
    assert messages[0].startswith("continuing: 5 of ")
    assert seen[-1].bytes_done == seen[-1].bytes_total


def test_a_source_that_changed_between_two_runs_is_encoded_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*packaged_texts()[:100], 5])
    out = tmp_path / "data"
    with pytest.raises(DataError, match="1 × 'text' is int, not a string"):
        prepare(config(out, source, **SMALL))
    texts = [*packaged_texts()[:100], "6"]
    write_jsonl(source, texts)
    prepare(config(out, source, **SMALL))
    prepare(config(tmp_path / "fresh", source, **SMALL))
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_complete_data_set_with_the_same_settings_is_not_changed(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    first = prepare(config(out, raw, **SMALL))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(config(out, raw, **SMALL, workers=2)) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_complete_but_damaged_data_set_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:5])
    prepare(config(tmp_path / "data", source))
    (tmp_path / "data" / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: missing\nRemove .*data to prepare it again"):
        prepare(config(tmp_path / "data", source))


def test_a_complete_data_set_with_other_settings_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:5])
    out = tmp_path / "data"
    prepare(config(out, source))
    with pytest.raises(ConfigError) as error:
        prepare(config(out, source, val_fraction=0.1, seed=3, on_bad="skip"))
    assert str(error.value) == (
        f"{out} contains a complete data set with other settings: val_fraction = 0.005, now 0.1; "
        f"seed = 0, now 3; on_bad = 'fail', now 'skip'. Choose another `out`, or remove {out} to prepare it "
        f"again"
    )
    other = write_jsonl(tmp_path / "b.jsonl", ["more"])
    with pytest.raises(ConfigError, match=r"other settings: sources \(for example b\.jsonl\)\. Choose"):
        prepare(config(out, source, other))
    write_jsonl(source, packaged_texts()[:6])
    with pytest.raises(ConfigError, match=r"other settings: sources \(for example a\.jsonl\)\. Choose"):
        prepare(config(out, source))
    prepare(config(tmp_path / "two", source, other))
    with pytest.raises(ConfigError, match="other settings: the order of sources"):
        prepare(config(tmp_path / "two", other, source))


def test_an_unfinished_preparation_with_other_settings_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one document", 5])
    out = tmp_path / "data"
    with pytest.raises(DataError, match="broken documents"):
        prepare(config(out, source))
    tokenizer = json.loads(load_encoding("outlast-4k").to_json())
    (tmp_path / "other.json").write_text(json.dumps(tokenizer | {"name": "other"}))
    with pytest.raises(ConfigError) as error:
        prepare(config(out, source, seed=3, tokenizer=str(tmp_path / "other.json")))
    assert str(error.value) == (
        f"{out} contains an unfinished preparation with other settings: tokenizer = 'outlast-4k', now "
        f"'other'; seed = 0, now 3. Continue it with those settings, choose another `out`, or remove "
        f"{out / '.prepare'} to start over"
    )
    manifest = prepare(config(out, source, on_bad="skip"))
    assert manifest.skipped == {"'text' is int, not a string": 1}


def test_a_folder_with_foreign_shards_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["fine"])
    out = tmp_path / "data"
    out.mkdir()
    (out / "train-00000.bin").touch()
    with pytest.raises(ConfigError, match=r"data contains train-00000\.bin but no manifest\.json"):
        prepare(config(out, source))
    assert [path.name for path in out.iterdir()] == ["train-00000.bin"]


def test_all_problems_of_the_input_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError) as error:
        prepare(config(tmp_path / "out", tmp_path / "none.jsonl", tokenizer="gpt-2"))
    tokenizer, source, out = error.value.problems
    assert tokenizer.startswith(
        "tokenizer 'gpt-2' is neither a file nor a known encoding; did you mean 'gpt2'?"
    )
    assert source == f"{tmp_path / 'none.jsonl'}: no such file or folder"
    assert out == f"out = {tmp_path / 'out'} is a file; name a folder"


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_documents_are_counted_by_reason_and_listed_with_file_and_line(
    tmp_path: Path, workers: int
) -> None:
    texts: list[object] = [f"document {n} with some words in it" for n in range(2000)]
    texts[7] = None
    texts[1500] = 3
    texts[1999] = None
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "data"
    with pytest.raises(DataError) as error:
        prepare(config(out, source, shard_tokens=1000, workers=workers))
    assert str(error.value).split("\n") == [
        "broken documents: 2 × 'text' is null, 1 × 'text' is int, not a string",
        f"{source}:8: 'text' is null",
        f"{source}:1501: 'text' is int, not a string",
        f"{source}:2000: 'text' is null",
        'Repair them and run again, or leave them out with on_bad = "skip"',
    ]
    assert exit_code_of(error.value) == 2
    assert not (out / "manifest.json").exists()
    manifest = prepare(config(out, source, shard_tokens=1000, workers=workers, on_bad="skip"))
    assert manifest.skipped == {"'text' is int, not a string": 1, "'text' is null": 2}
    assert manifest.documents == 1997


def test_a_preparation_stops_after_listing_a_hundred_broken_documents(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [None] * 250)
    with pytest.raises(DataError) as error:
        prepare(config(tmp_path / "data", source))
    lines = str(error.value).split("\n")
    assert lines[0] == "broken documents: 250 × 'text' is null"
    assert len(lines) == 103
    assert lines[100] == f"{source}:100: 'text' is null"
    assert lines[101] == "… and 150 more"
    seen: list[Progress] = []
    source = write_jsonl(tmp_path / "b.jsonl", [None] * 200 + ["a long document " * 50] * 500)
    with pytest.raises(DataError, match="200 × 'text' is null"):
        prepare(config(tmp_path / "b", source, shard_tokens=2000), seen.append)
    assert seen[-1].bytes_done < seen[-1].bytes_total / 4


class _RefusingEncoder(TiktokenEncoder):
    """Refuses some documents, as tiktoken does when it cannot encode one."""

    def encode(self, documents: Sequence[bytes]) -> FlatIds:
        if any(document.startswith(b"bad") for document in documents):
            raise DataError("the tokenizer cannot encode it: why")
        return super().encode(documents)


def _open_refusing(encoding: Encoding, _: EncoderChoice) -> tuple[_RefusingEncoder, None]:
    return _RefusingEncoder(encoding), None


def test_documents_that_the_tokenizer_cannot_encode_are_broken(tmp_path: Path) -> None:
    """They are listed with the others in the order of the file, whichever their split."""
    source = write_jsonl(tmp_path / "a.jsonl", ["good", *(f"bad {n}" for n in range(20)), None, "bad too"])
    encode = partial(encode_all, open_encoder=_open_refusing)
    with pytest.raises(DataError) as error:
        prepare(config(tmp_path / "data", source, val_fraction=0.4), encode=encode)
    reason = "the tokenizer cannot encode it: why"
    reasons = [*(f"{source}:{line}: {reason}" for line in range(2, 22)), f"{source}:22: 'text' is null"]
    head, *lines, _ = str(error.value).split("\n")
    assert head == f"broken documents: 21 × {reason}, 1 × 'text' is null"
    assert lines == [*reasons, f"{source}:23: {reason}"]
    skipping = config(tmp_path / "data", source, val_fraction=0.4, on_bad="skip")
    manifest = prepare(skipping, encode=encode)
    assert (manifest.documents, sum(manifest.skipped.values())) == (1, 22)


def test_sources_without_a_training_document_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"the sources contain no document for training \(0 were held out\)"):
        prepare(config(tmp_path / "data", source))


def test_an_empty_validation_split_is_reported(tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = write_jsonl(tmp_path / "a.jsonl", ["one document"])
    (tmp_path / "notes.pdf").touch()
    manifest = prepare(config(tmp_path.parent / "data", tmp_path), seen.append)
    assert manifest.val == ()
    assert source.exists()
    assert [progress.message for progress in seen if progress.message] == [
        f"ignoring 1 files of unsupported kinds in the folders: {tmp_path}/notes.pdf",
        "val_fraction = 0.005 held out no document: there is no validation split",
    ]


def test_two_preparations_of_one_folder_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    work = tmp_path / "data" / ".prepare"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            ConfigError, match="data: another preparation is writing here; wait until it ends"
        ):
            prepare(config(tmp_path / "data", source))
    prepare(config(tmp_path / "data", source))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_continues_after_a_failed_write(raw: Path, tmp_path: Path, workers: int) -> None:
    # A limit on the file size replaces the full disk: writes fail with EFBIG instead of ENOSPC.
    out = tmp_path / "data"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"stopped: .*File too large.*Finished work is kept; run again"):
            prepare(config(out, raw, **SMALL, workers=workers, tokenizer=_small_encoding(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    manifest = prepare(config(out, raw, **SMALL, workers=workers, tokenizer=_small_encoding(tmp_path)))
    assert list(verify(out)) == []
    assert manifest.documents == 400 + 1 + 100 + 20


def _small_encoding(folder: Path) -> str:
    """An encoding with only the 256 bytes, so that encoding.json is smaller than a shard."""
    path = folder / "bytes.json"
    if not path.exists():
        bytes_alone = {bytes([value]): value for value in range(256)}
        path.write_bytes(Encoding("bytes", r"\s+|\S+", bytes_alone, {"<|endoftext|>": 256}).to_json())
    return str(path)


def test_a_large_vocabulary_takes_four_bytes_per_token(tmp_path: Path) -> None:
    known = load_encoding("outlast-4k")
    wide = Encoding("wide", known.pattern, known.ranks, {"<|endoftext|>": 70_000})
    (tmp_path / "wide.json").write_bytes(wide.to_json())
    texts = packaged_texts()[:3]
    manifest = prepared(tmp_path / "data", texts, tokenizer=str(tmp_path / "wide.json"), val_fraction=0)
    assert manifest.dtype == "int32"
    for ids, text in zip(documents_of(tmp_path / "data", "train"), texts, strict=True):
        assert ids.tolist() == [*known.encode(text).tolist(), 70_000]
    assert [dtype_for(size) for size in (65_499, 65_500)] == ["uint16", "int32"]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """A chunk of 12.8 M tokens would take 100 MB as a list, or 25 MB as an array of two-byte ids."""
    line = (json.dumps({"text": "a b c d e f g h " * 100}) + "\n").encode()
    # not getrusage, whose peak includes that of the process that this one was forked from
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from data_pipeline.prepare.config import DataPrepConfig\n"
        "from data_pipeline.prepare.pipeline import prepare\n"
        "prepare(DataPrepConfig.model_validate_json(sys.argv[1]))\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    peaks_kib = []
    for name, copies in (("small", 3_000), ("large", 16_000)):
        source = tmp_path / f"{name}.jsonl.gz"
        source.write_bytes(gzip.compress(line * copies, compresslevel=1))
        settings = config(tmp_path / name, source, val_fraction=0).model_dump_json()
        command = [sys.executable, "-c", program, settings]
        peaks_kib.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks_kib[1] - peaks_kib[0] < 15_000, peaks_kib


def test_the_manifest_contains_the_checksums_of_the_sources(raw: Path, tmp_path: Path) -> None:
    import xxhash

    prepare(config(tmp_path / "data", raw, **SMALL))
    manifest = read_manifest(tmp_path / "data")
    (source,) = [source for source in manifest.sources if source["name"].endswith("a.jsonl")]
    content = (raw / "a.jsonl").read_bytes()
    assert source["size_bytes"] == len(content)
    assert len(source["ranges"]) > 5
    for part in source["ranges"]:
        assert xxhash.xxh3_128_hexdigest(content[part["start"] : part["stop"]]) == part["xxh3_128"]


def test_a_complete_data_set_is_compared_with_sources_of_another_time_or_place(tmp_path: Path) -> None:
    texts = packaged_texts()[:20]
    first, second = (write_jsonl(tmp_path / name / "x.jsonl", texts) for name in ("a", "b"))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"text": "packed"}).encode()))
    write_jsonl(second, texts[::-1])  # as long as the first
    out = tmp_path / "data"
    manifest = prepare(config(out, first, second, packed, **SMALL))
    os.utime(first)
    os.utime(packed)
    seen: list[Progress] = []
    assert prepare(config(out, first, second, packed, **SMALL), seen.append) == manifest
    assert [progress.message for progress in seen if progress.message] == [
        "comparing x.jsonl with its recorded checksum, because its time or place differs",
        "comparing c.jsonl.gz with its recorded checksum, because its time or place differs",
        f"{out} is complete already, with the same settings and sources: nothing is done",
    ]
    with pytest.raises(ConfigError, match=r"other settings: sources \(the text of x\.jsonl changed\)"):
        prepare(config(out, second, first, packed, **SMALL))
    write_jsonl(first, [texts[1], texts[0], *texts[2:]])  # another text of the same size
    with pytest.raises(ConfigError, match=r"other settings: sources \(the text of x\.jsonl changed\)"):
        prepare(config(out, first, second, packed, **SMALL))


def test_a_data_set_made_before_versions_were_recorded_is_recognised(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:5])
    out = tmp_path / "data"
    manifest = prepare(config(out, source))
    old = tuple({k: v for k, v in s.items() if k not in ("location", "version")} for s in manifest.sources)
    (out / "manifest.json").write_bytes(replace(manifest, sources=old).to_bytes())
    assert prepare(config(out, source)).fingerprint == manifest.fingerprint
    os.truncate(source, 0)
    write_jsonl(source, packaged_texts()[:5][::-1])
    with pytest.raises(ConfigError, match="other settings: sources"):
        prepare(config(out, source))


def test_text_files_are_split_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    out = tmp_path / "data"
    settings = {"val_fraction": 0, "document_separator": "<|endoftext|>", "deduplicate": True}
    manifest = prepare(config(out, tmp_path / "a.txt", **settings))
    encoding = load_encoding(out)
    assert [encoding.decode(ids[:-1].tolist()) for ids in documents_of(out, "train")] == ["one\n", "two\n"]
    assert prepare(config(out, tmp_path / "a.txt", **settings)) == manifest
    with pytest.raises(ConfigError, match=r"document_separator = '<\|endoftext\|>', now None"):
        prepare(config(out, tmp_path / "a.txt", val_fraction=0, deduplicate=True))
    plain = prepare(config(tmp_path / "plain", tmp_path / "a.txt", val_fraction=0))
    assert "document_separator" not in plain.preparation


def test_a_source_that_changes_during_the_preparation_ends_it(tmp_path: Path) -> None:
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", packaged_texts()[:20]) for n in range(3)]

    def append(_: Progress) -> None:
        if sources[1].stat().st_size == sources[0].stat().st_size:
            with sources[1].open("a") as file:
                file.write(json.dumps({"text": "more"}) + "\n")

    with pytest.raises(DataError, match=r"1\.jsonl: it changed while it was being prepared"):
        prepare(config(tmp_path / "data", *sources, **SMALL), append)
    manifest = prepare(config(tmp_path / "data", *sources, **SMALL))
    assert manifest.sources[1]["size_bytes"] == sources[1].stat().st_size
