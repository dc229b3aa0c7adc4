"""How fast text becomes shards and shards become batches, beside what a user would take instead.

Ratios of one run, since the machine may be shared:
`pytest -m benchmark tests/benchmarks/test_data_speed.py -s`.
"""

import json
import os
import random
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batches import BatchReader
from data_pipeline.encoder import FastEncoder
from data_pipeline.indexed import Header
from data_pipeline.manifest import FileRecord, read_manifest
from data_pipeline.tokenizer import load_encoding
from tests.unit.data_support import packaged_texts, prepared

pytestmark = pytest.mark.benchmark

WORKERS = len(os.sched_getaffinity(0))
_CORPUS_BYTES = 48_000_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source code, licences and chapters, shuffled: one JSON line each."""
    texts = packaged_texts()
    size = sum(map(len, texts))
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        if size > _CORPUS_BYTES:
            break
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        size += len(texts[-1])
    random.Random(0).shuffle(texts)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text), encoding="utf-8")
    return path


_OURS = """
import sys
from pathlib import Path
from data_pipeline.prepare import DataPrepConfig, prepare
if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    prepare(DataPrepConfig(sources=(source,), tokenizer="outlast-4k", out=Path(out), workers=int(workers)))
"""
# The recipe of many trainers: datasets.map, then one long memmap.
_MAP_AND_MEMMAP = """
import sys
import datasets, numpy as np
from data_pipeline.tokenizer import load_encoding
if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    encoding = load_encoding("outlast-4k")
    def encode(row):
        ids = encoding._bpe.encode_ordinary(row["text"]) + [encoding.end_of_text]
        return {"ids": ids, "length": len(ids)}
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=out + ".cache")
    rows = rows.map(encode, remove_columns=["text"], num_proc=int(workers))
    tokens = np.memmap(out, dtype=np.uint16, mode="w+", shape=(sum(rows["length"]),))
    place = 0
    for index in range(64):
        batch = rows.shard(64, index, contiguous=True).with_format("numpy")
        ids = np.concatenate(list(batch["ids"]))
        tokens[place : place + len(ids)] = ids
        place += len(ids)
    tokens.flush()
"""
# Megatron-LM's tools/preprocess_data.py in short: a pool encodes lines, the parent builds the index.
_POOL_AND_BUILDER = """
import json, multiprocessing, sys
import numpy as np, torch
from data_pipeline.tokenizer import load_encoding
def start():
    global encoding
    encoding = load_encoding("outlast-4k")
def encode(line):
    return encoding._bpe.encode_ordinary(json.loads(line)["text"]) + [encoding.end_of_text], len(line)
if __name__ == "__main__":
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    source, out, workers = sys.argv[1:]
    builder = IndexedDatasetBuilder(out + ".bin", dtype=np.uint16)
    with multiprocessing.Pool(int(workers), initializer=start) as pool, open(source) as lines:
        for ids, _ in pool.imap(encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(out + ".idx")
"""


def _wall_s(program: str, corpus: Path, out: Path, workers: int = WORKERS) -> float:
    path = out.with_suffix(".py")
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(path), str(corpus), str(out), str(workers)],
        env=environment,
        capture_output=True,
        text=True,
    )
    took_s = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-2000:]
    return took_s


def test_preparing_is_several_times_faster_than_the_recipes_a_user_would_take(
    corpus: Path, tmp_path: Path
) -> None:
    ours_s = min(_wall_s(_OURS, corpus, tmp_path / f"ours{n}") for n in range(2))
    map_s = _wall_s(_MAP_AND_MEMMAP, corpus, tmp_path / "map")
    pytest.importorskip("megatron.core")
    pool_s = _wall_s(_POOL_AND_BUILDER, corpus, tmp_path / "pool")
    manifest = read_manifest(tmp_path / "ours0")
    tokens = manifest.train_tokens + manifest.val_tokens
    assert (tmp_path / "map").stat().st_size == 2 * tokens
    assert (tmp_path / "pool.bin").stat().st_size == 2 * tokens
    megabytes = corpus.stat().st_size / 1e6
    print(
        f"\n{megabytes:.0f} MB, {tokens:,} tokens, {WORKERS} processes, whole programs: ours {ours_s:.1f} s; "
        f"datasets.map + memmap {map_s:.1f} s ({map_s / ours_s:.1f} ×); "
        f"pool + Megatron's builder {pool_s:.1f} s ({pool_s / ours_s:.1f} ×)"
    )
    assert min(map_s, pool_s) > 4 * ours_s


def test_two_workers_cost_little_more_than_one_and_so_are_about_twice_as_fast(
    corpus: Path, tmp_path: Path
) -> None:
    """Held to the CPU time of all processes, which other users of the machine disturb less than the clock."""
    large = tmp_path / "large.jsonl"  # so large that starting does not decide
    large.write_bytes(corpus.read_bytes() * 5)
    wall_s, cpu_s = [], []
    for workers in (1, 2):
        before = os.times()
        wall_s.append(_wall_s(_OURS, large, tmp_path / str(workers), workers))
        after = os.times()
        cpu_s.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    print(
        f"\none worker {wall_s[0]:.1f} s, two {wall_s[1]:.1f} s: {wall_s[0] / wall_s[1]:.2f} ×; "
        f"CPU time {cpu_s[0]:.1f} s and {cpu_s[1]:.1f} s: {cpu_s[1] / cpu_s[0]:.2f} ×"
    )
    assert cpu_s[1] < 1.4 * cpu_s[0]


def test_the_fast_encoder_checked_all_along_is_several_times_faster_than_tiktoken(corpus: Path) -> None:
    encoding = load_encoding("outlast-4k")
    fast = FastEncoder(encoding)
    texts = [json.loads(line)["text"] for line in corpus.open()][:4000]
    batches = [texts[first : first + 100] for first in range(0, len(texts), 100)]
    size = sum(len(text.encode()) for text in texts) / 1e6

    def rate(encode: Callable[[list[str]], object]) -> float:
        began_s = time.process_time()
        for batch in batches:
            encode(batch)
        return size / (time.process_time() - began_s)

    reference = rate(lambda batch: [encoding.encode(text) for text in batch])
    alone, checked = rate(fast._ids), rate(fast.encode)
    print(f"\nMB/s of CPU time: tiktoken {reference:.1f}, fastokens {alone:.1f}, checked {checked:.1f}")
    assert checked > 2 * reference
    assert checked > 0.6 * alone


@pytest.mark.parametrize("document_mask", [True, False])
def test_batches_in_random_order_are_read_at_over_200_million_tokens_a_second(
    tmp_path: Path, document_mask: bool
) -> None:
    """8 × 2049 ids in int64 out of 200 M tokens in the page cache, beside a bare copy of the windows."""
    manifest = prepared(tmp_path / "small", ["one"], val_fraction=0)
    data = tmp_path / "data"
    data.mkdir()
    choose = np.random.default_rng(0)
    ids = choose.integers(0, 4095, 200_000_000, dtype=np.uint16)
    ends = np.unique(np.append(choose.integers(1, len(ids), len(ids) // 800), len(ids)))
    ids[ends - 1] = manifest.encoding.end_of_text
    lengths = np.diff(ends, prepend=0).astype(np.int32)
    ids.tofile(data / "train-00000.bin")
    count = len(lengths)
    index = Header("uint16", count, count).pack() + lengths.tobytes() + (2 * (ends - lengths)).tobytes()
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    (data / "train-00000.idx").write_bytes(index)
    (data / "train-00000.sum").touch()
    shard = replace(
        manifest.train[0],
        tokens=len(ids),
        documents=count,
        bin=FileRecord(2 * len(ids), "0"),
        idx=FileRecord(len(index), "0"),
        sum=FileRecord(0, "0"),
    )
    (data / "manifest.json").write_bytes(replace(manifest, train=(shard,)).to_bytes())
    reader = BatchReader([(data, 1.0)], context=2048, global_batch=8, seed=1, document_mask=document_mask)
    rates, bare = [], []
    for part in range(6):
        began_s = time.process_time()
        for step in range(1 + 400 * part, 401 + 400 * part):
            reader.batch(step, 0, 1)
        rates.append(400 * 8 * 2048 / (time.process_time() - began_s) / 1e6)
        starts = choose.integers(0, len(ids) - 2049, (400, 8)).tolist()
        began_s = time.process_time()
        for row in starts:
            out = np.empty((8, 2049), np.int64)
            for place, start in enumerate(row):
                out[place] = ids[start : start + 2049]
        bare.append(400 * 8 * 2048 / (time.process_time() - began_s) / 1e6)
    print(f"\nmask {document_mask}: {max(rates):.0f} M tokens/s of CPU time; a bare copy {max(bare):.0f}")
    assert max(rates) > min(200, max(bare) / 3)
