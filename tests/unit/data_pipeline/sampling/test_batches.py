import hashlib
import itertools
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import FileRecord, read_manifest
from data_pipeline.dataset.megatron_index import Header
from data_pipeline.errors import ConfigError, DataError, DataExhausted
from data_pipeline.sampling.batch_schedule import BatchSizes
from data_pipeline.sampling.batches import BatchReader, windows_in
from data_pipeline.sampling.evaluation import EvaluationReader
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from tests.unit.data_pipeline.sampling.support import CONTEXT, segments
from tests.unit.data_pipeline.support import documents_of, prepared


def _reader(*folders: Path, **changes: object) -> BatchReader:
    settings = {"context": CONTEXT, "global_batch": 12, "seed": 1, **changes}
    return BatchReader([(folder, 1.0 + n) for n, folder in enumerate(folders)], **settings)  # type: ignore[arg-type]


def _expected(
    documents: list[NDArray[np.int64]], window: int, document_mask: bool
) -> tuple[NDArray[np.int64], list[int], list[bool]]:
    """Ids, segment ends and scored targets of one window, token by token."""
    stream = np.concatenate(documents)
    owner = np.concatenate([np.full(len(document), n) for n, document in enumerate(documents)])
    start = window * CONTEXT
    ends, scored = [], []
    for place in range(start, start + CONTEXT):
        is_same = owner[place] == owner[place + 1] or not document_mask
        scored.append(bool(is_same))
        if not is_same or place == start + CONTEXT - 1:
            ends.append(place - start + 1)
    return stream[start : start + CONTEXT + 1], ends, scored


@pytest.mark.parametrize("document_mask", [True, False])
def test_an_epoch_contains_every_window_once_with_its_ids_and_segments(
    data: Path, document_mask: bool
) -> None:
    documents = documents_of(data, "train")
    reader = _reader(data, document_mask=document_mask)
    windows = (sum(map(len, documents)) - 1) // CONTEXT
    assert windows_in(reader.tokens, CONTEXT) == windows
    wanted = {}
    for window in range(windows):
        ids, ends, scored = _expected(documents, window, document_mask)
        wanted[ids.tobytes()] = (ends, scored)
    assert len(wanted) == windows
    seen = []
    for step in range(1, windows // 12 + 2):
        batch = reader.batch(step, 0, 1)
        assert batch.tokens.dtype == np.int64
        assert batch.document_ends.dtype == np.int32
        for row, ends in enumerate(segments(batch)):
            if batch.sequence_numbers[row] < windows:
                key = batch.tokens[row].tobytes()
                seen.append(key)
                assert (ends, batch.scored[row].tolist()) == wanted[key]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize("worlds", [[1], [2], [3], [4], [6], [12], [1, 2, 12, 3, 6, 4]])
@pytest.mark.parametrize("ramp", [[], [(3, 12), (5, 24), (1, 36)]])
def test_changing_the_world_size_changes_no_sequence_of_an_epoch(
    data: Path, other: Path, worlds: list[int], ramp: list[tuple[int, int]]
) -> None:
    sizes = [size for steps, size in ramp for _ in range(steps)] + [12] * 40
    reader = _reader(data, other, global_batch=BatchSizes(12, ramp))
    reference = _reader(data, other, global_batch=BatchSizes(12, ramp))
    for step in range(1, 40):
        world_size = worlds[step % len(worlds)]
        parts = [reader.batch(step, rank, world_size) for rank in range(world_size)]
        whole = reference.batch(step, 0, 1)
        numbers = np.concatenate([part.sequence_numbers for part in parts])
        consumed = sum(sizes[: step - 1])
        assert numbers.tolist() == list(range(consumed, consumed + sizes[step - 1]))
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        assert np.array_equal(np.concatenate([part.scored for part in parts]), whole.scored)
        assert [row for part in parts for row in segments(part)] == segments(whole)


def test_document_boundaries_come_from_the_index_if_end_of_text_does_not_show_them(
    data: Path, tmp_path: Path
) -> None:
    """Files whose manifest does not say that end-of-text ends every document give the same batches."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "manifest.json").write_bytes(replace(read_manifest(data), preparation={}).to_bytes())
    assert read_manifest(data).is_ended_by_token
    assert not read_manifest(copy).is_ended_by_token
    for step in range(1, 20):
        by_token, by_index = (_reader(folder).batch(step, 0, 1) for folder in (data, copy))
        assert np.array_equal(by_token.document_ends, by_index.document_ends)
        assert np.array_equal(by_token.scored, by_index.scored)
    for tokens in (1, 63, 64, 200, 10**9):
        windows = []
        for folder in (data, copy):
            reader = EvaluationReader(folder, context=CONTEXT, tokens=tokens, document_mask=True)
            windows.append(reader.windows(0, len(reader) + 2))
        assert np.array_equal(windows[0].document_ends, windows[1].document_ends)
        assert np.array_equal(windows[0].scored, windows[1].scored)


def test_a_batch_depends_only_on_its_step(data: Path) -> None:
    reader = _reader(data)
    forward = [reader.batch(step, 1, 2).tokens for step in (1, 2, 500, 3)]
    backward = [_reader(data).batch(step, 1, 2).tokens for step in (3, 500, 2, 1)]
    for one, two in zip(forward, backward[::-1], strict=True):
        assert np.array_equal(one, two)


def test_the_batches_are_the_same_in_every_version(data: Path) -> None:
    # Runs in progress depend on these numbers.
    reader = _reader(data)
    digest = hashlib.sha256(b"".join(reader.batch(step, 0, 1).tokens.tobytes() for step in (1, 2, 1000)))
    assert digest.hexdigest()[:16] == "781e58b04c653f4c"


def test_segments_end_with_documents_and_no_target_is_in_another_document(data: Path) -> None:
    end_of_text = read_manifest(data).encoding.end_of_text
    batch = _reader(data).batch(1, 0, 1)
    inputs = batch.tokens[:, :-1].reshape(-1)
    starts = np.concatenate([[0], batch.document_ends[:-1]])
    for start, end in zip(starts, batch.document_ends, strict=True):
        # only the last input of a segment may be an end-of-text
        assert end_of_text not in inputs[start : end - 1]
    assert np.array_equal(batch.scored, batch.tokens[:, :-1] != end_of_text)


@given(size=st.integers(1, 12), step=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_micro_batches_together_are_the_batch(data: Path, size: int, step: int) -> None:
    batch = _reader(data).batch(step, 0, 1)
    parts = list(batch.micro_batches(size))
    assert [len(part.tokens) for part in parts][:-1] == [size] * (len(parts) - 1)
    for name in ("tokens", "scored", "sequence_numbers"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert [row for part in parts for row in segments(part)] == segments(batch)
    for part in parts:
        assert part.document_ends[-1] == part.scored.size
        assert (np.diff(part.document_ends, prepend=0) > 0).all()


def test_skipped_sequences_are_left_out_and_all_others_stay_in_order(data: Path) -> None:
    skipped = [(30, 41), (5, 9), (7, 12), (100, 101)]
    reader = _reader(data, skipped=skipped)
    plain = _reader(data)
    rows = {
        int(n): plain.batch(s, 0, 1).tokens[r]
        for s in range(1, 12)
        for r, n in enumerate(range(12 * (s - 1), 12 * s))
    }
    gone = {number for first, stop in skipped for number in range(first, stop)}
    kept = iter(number for number in range(1000) if number not in gone)
    for step in range(1, 9):
        for rank in range(3):
            batch = reader.batch(step, rank, 3)
            for number, ids in zip(batch.sequence_numbers.tolist(), batch.tokens, strict=True):
                assert number == next(kept)
                assert np.array_equal(ids, rows[number])


def test_an_empty_or_negative_skipped_range_is_refused(data: Path) -> None:
    for bad in ((5, 5), (-1, 3)):
        with pytest.raises(ValueError, match="skipped range"):
            _reader(data, skipped=[bad])


@given(
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6),
    more=st.tuples(st.integers(0, 90), st.integers(1, 9)),
    step=st.integers(0, 8),
)
@settings(max_examples=100, deadline=None)
def test_skipping_more_changes_only_later_batches_or_is_refused(
    data: Path, ranges: list[tuple[int, int]], more: tuple[int, int], step: int
) -> None:
    skipped = [(first, first + size) for first, size in ranges]
    first, stop = more[0], more[0] + more[1]
    gone = {number for a, b in skipped for number in range(a, b)}
    order = [number for number in range(300) if number not in gone]
    reader = _reader(data, skipped=skipped)
    consumed = order[12 * step - 1] + 1 if step else 0
    assert reader.numbers_consumed(step) == consumed
    if min(set(range(first, stop)) - gone, default=consumed) < consumed:
        with pytest.raises(ConfigError, match=f"which the run has read by step {step}"):
            reader.skip([(first, stop)], step)
        return
    reader.skip([(first, stop)], step)
    later = [number for number in order if number < consumed or not first <= number < stop]
    read = np.concatenate([reader.batch(n, 0, 1).sequence_numbers for n in range(1, 12)])
    assert read.tolist() == later[: len(read)]
    assert {number for a, b in reader.skipped for number in range(a, b)} == gone | set(range(first, stop))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(reader.skipped))


def test_sources_are_read_in_proportion_to_their_weights(data: Path, other: Path) -> None:
    reader = _reader(data, other)  # weights 1 and 2
    assert reader.counts_at(1000) == [4000, 8000]
    assert reader.tokens == sum(read_manifest(folder).train_tokens for folder in (data, other))
    windows = [(read_manifest(folder).train_tokens - 1) // CONTEXT for folder in (data, other)]
    known = set(
        map(bytes, np.concatenate(documents_of(data, "train"))[: windows[0] * CONTEXT].reshape(-1, CONTEXT))
    )
    batch = reader.batch(1, 0, 1)
    assert sum(bytes(row[:-1]) in known for row in batch.tokens) == 4


def test_reading_past_max_epochs_is_an_error(data: Path, other: Path) -> None:
    windows = windows_in(read_manifest(data).train_tokens, CONTEXT)
    reader = _reader(data, max_epochs=1.5)
    last = int(1.5 * windows) // 12
    reader.batch(last, 0, 1)
    with pytest.raises(DataExhausted) as error:
        reader.batch(last + 1, 0, 1)
    assert str(error.value) == (
        f"step {last + 1} would read {data} more than data.max_epochs = 1.5 times; prepare more text, train "
        f"fewer steps, or raise data.max_epochs"
    )
    with pytest.raises(DataExhausted, match=f"would read {other} more than"):
        _reader(data, other, max_epochs=1).batch(10**6, 0, 1)


def test_impossible_ranks_and_steps_are_refused(data: Path) -> None:
    for step, rank, world_size in ((0, 0, 1), (1, 2, 2), (1, -1, 2), (1, 0, 5)):
        with pytest.raises(
            ValueError, match=f"step {step}, rank {rank} of {world_size}, 12 sequences a step"
        ):
            _reader(data).batch(step, rank, world_size)


def test_a_source_shorter_than_one_sequence_is_refused(data: Path) -> None:
    tokens = read_manifest(data).train_tokens
    assert _reader(data, context=tokens - 1).batch(1, 0, 1).tokens.shape == (12, tokens)
    with pytest.raises(
        DataError, match=rf"{tokens} training tokens are less than one sequence of context {tokens} \+"
    ):
        _reader(data, context=tokens)


def test_sources_of_different_encodings_are_refused(data: Path, tmp_path: Path) -> None:
    known = load_encoding("outlast-4k")
    specials = {**known.special_tokens, "<|more|>": 4096}
    extended = Encoding("more", known.pattern, known.ranks, specials)
    (tmp_path / "e.json").write_bytes(extended.to_json())
    prepared(tmp_path / "b", ["x y z " * 1000], tokenizer=str(tmp_path / "e.json"), val_fraction=0)
    with pytest.raises(
        DataError, match=r"was prepared with tokenizer 'more' and .* with 'outlast-4k': their ids"
    ):
        _reader(data, tmp_path / "b")


def test_a_data_set_of_1e12_tokens_opens_quickly_with_few_open_files(tmp_path: Path) -> None:
    """Opening 2,000 shards of sparse files scans and caches nothing and does not keep all of them open."""
    manifest = prepared(tmp_path / "small", ["word " * 100], val_fraction=0)
    tokens, shards = 500_000_000, 2000
    data = tmp_path / "large"
    data.mkdir()
    index = Header("uint16", 1, 1).pack() + struct.pack("<iqqq", tokens, 0, 0, 1)
    shard = replace(
        manifest.train[0],
        tokens=tokens,
        documents=1,
        bin=FileRecord(2 * tokens, "0"),
        idx=FileRecord(len(index), "0"),
        sum=FileRecord(0, "0"),
    )
    train = tuple(replace(shard, name=f"train-{number:05d}") for number in range(shards))
    for one in train:
        with (data / f"{one.name}.bin").open("wb") as file:
            file.truncate(2 * tokens)
        (data / f"{one.name}.idx").write_bytes(index)
        (data / f"{one.name}.sum").touch()
    (data / "manifest.json").write_bytes(replace(manifest, train=train).to_bytes())
    before = _open_files()  # earlier tests may have left some open
    began = time.perf_counter()
    reader = BatchReader([(data, 1.0)], context=2048, global_batch=512, seed=1)
    first = reader.batch(1, 0, 64)
    took_s = time.perf_counter() - began
    assert reader.tokens == 10**12
    assert first.tokens.shape == (8, 2049)
    assert took_s < 3  # it takes 0.1 s on an idle machine
    reader.batch(2, 0, 1)
    reader.batch(3, 0, 1)
    assert _open_files() - before <= 2 * 256


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
