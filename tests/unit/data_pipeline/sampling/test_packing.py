import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.sampling.batch import Batch
from data_pipeline.sampling.batches import BatchReader, windows_in
from data_pipeline.sampling.packing import pack, rows_per_block
from tests.unit.data_pipeline.support import documents_of, packaged_texts, prepared

CONTEXT = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verses, most of them shorter than a row, and some chapters, in shards that end anywhere."""
    chapters = packaged_texts()[:40]
    texts = [verse for chapter in chapters[:30] for verse in chapter.split("\n")] + chapters[30:]
    out = tmp_path_factory.mktemp("packing") / "data"
    assert len(prepared(out, texts, val_fraction=0, shard_tokens=3000).train) > 5
    return out


def _reader(folder: Path, **changes: object) -> BatchReader:
    settings = {"context": CONTEXT, "global_batch": 12, "seed": 1, "packing": "best-fit", **changes}
    return BatchReader([(folder, 1.0)], **settings)  # type: ignore[arg-type]


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rows by the definition of the algorithm, which looks at every row for every document."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    context=st.integers(1, 16),
)
@settings(max_examples=300, deadline=None)
def test_a_block_becomes_full_rows_and_documents_that_fit_are_placed_by_best_fit(
    lengths: list[int], context: int
) -> None:
    lengths.append(-sum(lengths) % context or context)
    edges = 1000 + np.cumsum([0, *lengths])
    rows = pack(edges, context)
    assert [sum(stop - start for start, stop in row) for row in rows] == [context] * (sum(lengths) // context)
    parts = sorted(itertools.chain.from_iterable(rows))
    assert parts[0][0] == edges[0]
    assert parts[-1][1] == edges[-1]
    assert all(first[1] == second[0] for first, second in itertools.pairwise(parts))
    rests = [length % context for length in lengths if length % context]
    wanted = _best_fit_decreasing(rests, context)
    if sum(context - sum(row) for row in wanted) == 0:  # no document had to be cut into the gaps
        full = sum(length // context for length in lengths)
        found = [sorted(stop - start for start, stop in row) for row in rows[full:]]
        assert Counter(map(tuple, found)) == Counter(tuple(sorted(row)) for row in wanted)
    cut = set(itertools.chain.from_iterable(parts)) - set(edges.tolist())
    for row in rows:
        assert all(stop not in cut for _, stop in row[:-1])


def _segments(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, first input, stop) of each attention segment."""
    ends = batch.document_ends.tolist()
    starts = [0, *ends[:-1]]
    return [
        (start // CONTEXT, start % CONTEXT, (end - 1) % CONTEXT + 1)
        for start, end in zip(starts, ends, strict=True)
    ]


def test_an_epoch_contains_every_token_once_in_segments_of_single_documents(data: Path) -> None:
    documents = documents_of(data, "train")
    text = b"|".join(document.astype(">u2").tobytes().hex(" ", 2).encode() for document in documents)
    end_of_text = read_manifest(data).encoding.end_of_text
    reader = _reader(data)
    rows = windows_in(reader.tokens, CONTEXT)
    seen: Counter[int] = Counter()
    whole = 0
    for step in range(1, rows // 12 + 2):
        batch = reader.batch(step, 0, 1)
        for row, first, stop in _segments(batch):
            if batch.sequence_numbers[row] >= rows:
                continue
            ids = batch.tokens[row, first:stop]
            seen.update(ids.tolist())
            is_open = stop == CONTEXT and ids[-1] != end_of_text
            with_target = batch.tokens[row, first : stop + is_open]
            assert with_target.astype(">u2").tobytes().hex(" ", 2).encode() in text
            assert batch.scored[row, first : stop - 1].all()
            assert batch.scored[row, stop - 1] == is_open
            whole += ids[-1] == end_of_text and (
                b"|" + ids.astype(">u2").tobytes().hex(" ", 2).encode() + b"|" in b"|" + text + b"|"
            )
    assert seen == Counter(np.concatenate(documents)[: rows * CONTEXT].tolist())
    short = sum(len(document) <= CONTEXT for document in documents)
    assert whole > 0.93 * short


def test_packed_batches_depend_only_on_the_step_for_any_world_size(data: Path) -> None:
    wholes = {step: _reader(data).batch(step, 0, 1) for step in (40, 1, 7)}
    reader = _reader(data)
    for step, whole in wholes.items():
        parts = [reader.batch(step, rank, 3) for rank in range(3)]
        for name in ("tokens", "scored", "sequence_numbers"):
            together = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(together, getattr(whole, name))


@pytest.mark.parametrize("document_mask", [True, False])
def test_document_boundaries_from_the_index_give_the_same_rows(
    data: Path, tmp_path: Path, document_mask: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "manifest.json").write_bytes(replace(read_manifest(data), preparation={}).to_bytes())
    for step in range(1, 20):
        one, two = (_reader(f, document_mask=document_mask).batch(step, 0, 1) for f in (data, copy))
        for name in ("tokens", "scored", "document_ends"):
            assert np.array_equal(getattr(one, name), getattr(two, name))
        if not document_mask:
            assert one.scored.all()
            assert one.document_ends.tolist() == list(range(CONTEXT, 12 * CONTEXT + 1, CONTEXT))


def test_packing_cuts_few_documents_where_a_stream_cuts_many(data: Path) -> None:
    """Compares the fraction of the documents of at most a row that are in one row."""
    documents = documents_of(data, "train")
    short = {d.tobytes() for d in documents if len(d) <= CONTEXT}
    found = {}
    for kind in ("stream", "best-fit"):
        reader = _reader(data, packing=kind)
        seen = set()
        for step in range(1, windows_in(reader.tokens, CONTEXT) // 12 + 1):
            batch = reader.batch(step, 0, 1)
            seen |= {batch.tokens[row, first:stop].tobytes() for row, first, stop in _segments(batch)}
        found[kind] = len(short & seen) / len(short)
    # Verses are about as long as a row or half a row, so packing them is harder than usual.
    assert found["best-fit"] > 0.93
    assert found["stream"] < 0.7


def test_a_block_has_about_the_same_number_of_documents_of_any_length() -> None:
    assert rows_per_block(800 * 10**6, 10**6, 2048) == 400
    assert rows_per_block(10**9, 10**8, 2048) == 16
    assert rows_per_block(10**9, 10, 2048) == 1024
    assert rows_per_block(100, 0, 10) == 1024
