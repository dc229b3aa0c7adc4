"""The speed of reading batches and of opening a data set, compared with a bare copy and other loaders.

Run with `pytest -m benchmark tests/benchmarks/test_reading_speed.py -s`. megatron-core is in the extra
`peers`; litdata and ai2-olmo-core are measured if they are installed (`pip install` is enough). Rates are per
second of CPU time of one process, which other load on the machine disturbs less than wall-clock time.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data_pipeline.dataset.megatron_index import Header
from data_pipeline.sampling.batches import BatchReader
from tests.benchmarks.synthetic_data import hollow_tokens, random_tokens, shard_record
from tests.paths import ROOT
from tests.unit.data_pipeline.support import prepared

pytestmark = pytest.mark.benchmark

ROWS, CONTEXT = 8, 2048
_TOKENS = 1_000_000_000
_LITDATA_TOKENS = (
    200_000_000  # it shuffles only within chunks, so a larger set would change nothing but the duration
)
_BATCHES = 300
_TARGET = 200e6  # tokens per second, on a machine where a bare copy of the windows reaches 430 million
_TARGET_OF_BARE_COPY = 200 / 430


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A billion ids, 2 GB, which are in the page cache because they have just been written."""
    folder = tmp_path_factory.mktemp("reading") / "data"
    random_tokens(folder, _TOKENS)
    return folder


def _rate(next_batch: Callable[[], Any], batches: int = _BATCHES) -> float:
    """Tokens per second of CPU time, the best of several parts."""
    next_batch()
    rates = []
    for _ in range(5):
        began_s = time.process_time()
        for _ in range(batches):
            next_batch()
        rates.append(batches * ROWS * CONTEXT / (time.process_time() - began_s))
    return max(rates)


def _bare_copy(data: Path) -> Callable[[], object]:
    """The upper bound: copies mapped windows at random positions into a new int64 array."""
    ids = np.memmap(data / "train-00000.bin", np.uint16, mode="r")
    choose = np.random.default_rng(0)
    places = iter(choose.integers(0, len(ids) - CONTEXT - 1, (10_000, ROWS)).tolist())

    def copy() -> object:
        out = np.empty((ROWS, CONTEXT + 1), np.int64)
        for row, start in enumerate(next(places)):
            out[row] = ids[start : start + CONTEXT + 1]
        return out

    return copy


def _ours(data: Path, document_mask: bool) -> Callable[[], object]:
    reader = BatchReader(
        [(data, 1.0)], context=CONTEXT, global_batch=ROWS, seed=1, document_mask=document_mask
    )
    steps = itertools.count(1)
    return lambda: reader.batch(next(steps), 0, 1)


class _Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    vocab_size, eod, pad = 4097, 4096, 4097
    bos = cls = sep = mask = eos = -1
    unique_identifiers: ClassVar = OrderedDict(kind="none")


def megatron_dataset(prefix: Path, cache: Path) -> Any:
    """megatron-core's GPTDataset of one shard, with its index files in `cache`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=CONTEXT,
            path_to_cache=str(cache),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indexed = IndexedDataset(str(prefix), multimodal=False, mmap=True)
        documents = np.arange(len(indexed), dtype=np.int32)
        return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def _megatron(data: Path, work: Path) -> Callable[[], object]:
    import torch

    dataset = megatron_dataset(data / "train-00000", work / "megatron")
    numbers = itertools.count()
    return lambda: torch.stack([dataset[next(numbers)]["tokens"] for _ in range(ROWS)])


def _olmo_core(data: Path, work: Path) -> Callable[[], object]:
    from olmo_core.data import NumpyFSLDataset
    from olmo_core.data.collator import DataCollator
    from olmo_core.data.data_loader import NumpyFSLDataLoader

    dataset = NumpyFSLDataset(
        str(data / "train-00000.bin"),
        sequence_length=CONTEXT,
        pad_token_id=0,
        eos_token_id=4096,
        vocab_size=4097,
        dtype=np.uint16,
    )
    loader = NumpyFSLDataLoader(
        dataset,
        collator=DataCollator(pad_token_id=0),
        global_batch_size=ROWS * CONTEXT,
        work_dir=work / "olmo",
        seed=1,
        num_threads=0,
    )
    (work / "olmo").mkdir()
    loader.reshuffle(epoch=1)
    batches = iter(loader)
    return lambda: next(batches)["input_ids"].long()


_OPTIMIZE = """
import sys
import numpy as np, torch
from litdata import TokensLoader, optimize
def block(first):
    ids = np.memmap(sys.argv[1], np.uint16, mode="r")[first : first + 10_000_000]
    yield torch.from_numpy(ids.astype(np.int32))
if __name__ == "__main__":
    optimize(block, list(range(0, int(sys.argv[3]), 10_000_000)), sys.argv[2], chunk_bytes="64MB",
             num_workers=1, item_loader=TokensLoader())
"""


def _litdata(data: Path, work: Path) -> Callable[[], object]:
    """litdata has its own format; its `optimize` converts a part of the ids first."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    program = work / "optimize.py"
    program.write_text(_OPTIMIZE)
    command = [sys.executable, program, data / "train-00000.bin", work / "litdata", str(_LITDATA_TOKENS)]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    blocks = TokensLoader(block_size=CONTEXT + 1)
    dataset = StreamingDataset(str(work / "litdata"), item_loader=blocks, shuffle=True, drop_last=False)

    def forever() -> Iterator[Any]:
        while True:
            yield from dataset

    rows = forever()
    return lambda: torch.stack([next(rows) for _ in range(ROWS)]).long()


def test_reading_reaches_200_million_tokens_per_second_and_is_faster_than_its_peers(
    data: Path, tmp_path: Path
) -> None:
    """Reads batches of 8 × 2049 int64 ids of a billion in random order; ours also with document ends."""
    bare = _rate(_bare_copy(data))
    ours = {is_masked: _rate(_ours(data, is_masked)) for is_masked in (False, True)}
    peers = {}
    for name, package, make in (
        ("Megatron's GPTDataset", "megatron.core", _megatron),
        ("OLMo-core", "olmo_core", _olmo_core),
        (f"litdata, shuffled within chunks, {_LITDATA_TOKENS / 1e9:g}e9 tokens", "litdata", _litdata),
    ):
        with contextlib.suppress(ModuleNotFoundError):
            __import__(package)
            peers[name] = _rate(make(data, tmp_path), batches=100)
    print(
        f"\nM tokens/s of CPU time: bare copy {bare / 1e6:.0f}; ours {ours[False] / 1e6:.0f} "
        f"({ours[False] / bare:.2f} of it), with document ends {ours[True] / 1e6:.0f}; "
        + "; ".join(
            f"{name} {rate / 1e6:.0f} ({ours[False] / rate:.1f} × slower)" for name, rate in peers.items()
        )
    )
    # On a slower machine, the target is the same fraction of the bare copy's rate.
    assert ours[False] > min(_TARGET, bare * _TARGET_OF_BARE_COPY)
    assert all(ours[False] > rate for name, rate in peers.items() if "within chunks" not in name)


_SHARDS = 10_000
_SHARD_TOKENS = 100_000_000
_PEAK = """
import sys, time
from pathlib import Path
def peak_mb():  # of this program only: getrusage's peak includes the parent's
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3
"""
_OPEN = (
    _PEAK
    + """
from data_pipeline.sampling.batches import BatchReader
imports_mb = peak_mb()
began_s, began_cpu_s = time.perf_counter(), time.process_time()
reader = BatchReader([(Path(sys.argv[1]), 1.0)], context=2048, global_batch=8, seed=1)
batch = reader.batch(1, 0, 1)
took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
assert batch.tokens.shape == (8, 2049)
print(reader.tokens, took_s, cpu_s, peak_mb() - imports_mb)
"""
)


@pytest.fixture(scope="module")
def trillion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of 1e12 tokens in 10,000 shards, of which only the headers are not holes."""
    folder = tmp_path_factory.mktemp("opening") / "data"
    template = prepared(folder.with_name("template"), ["one"], val_fraction=0)
    folder.mkdir()
    header = Header("uint16", _SHARD_TOKENS // 800, _SHARD_TOKENS // 800)
    with (folder / "the.idx").open("wb") as file:
        file.write(header.pack())
        file.truncate(header.idx_bytes)
    shards = []
    for number in range(_SHARDS):
        shard = shard_record(f"train-{number:05d}", _SHARD_TOKENS, header.documents, header.idx_bytes)
        with (folder / f"{shard.name}.bin").open("wb") as file:
            file.truncate(shard.bin.size_bytes)
        (folder / f"{shard.name}.idx").hardlink_to(folder / "the.idx")
        (folder / f"{shard.name}.sum").touch()
        shards.append(shard)
    (folder / "manifest.json").write_bytes(replace(template, train=tuple(shards)).to_bytes())
    return folder


def test_a_trillion_tokens_open_within_a_second_and_100_megabytes(trillion: Path) -> None:
    """Measured in CPU time; wall-clock time is printed too. The megabytes exclude the imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(trillion)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        tokens, took_s, cpu_s, more_mb = map(float, done.stdout.split())
        found.append((cpu_s, took_s, more_mb))
    cpu_s, took_s, more_mb = min(found)
    assert tokens == 1e12
    print(
        f"\n1e12 tokens in {_SHARDS} shards, opened and a batch read: {took_s:.2f} s "
        f"(CPU {cpu_s:.2f} s), {more_mb:.0f} MB more"
    )
    assert not list(trillion.glob("*cache*"))
    assert cpu_s < 1
    assert more_mb < 100


_OPEN_THEIRS = (
    _PEAK
    + """
from tests.benchmarks.test_reading_speed import megatron_dataset
import torch, megatron.core.datasets.gpt_dataset, megatron.core.datasets.helpers_cpp
imports_mb = peak_mb()
began_s, began_cpu_s = time.perf_counter(), time.process_time()
dataset = megatron_dataset(Path(sys.argv[1]), Path(sys.argv[2]))
torch.stack([dataset[n]["tokens"] for n in range(8)])
print(time.perf_counter() - began_s, time.process_time() - began_cpu_s, peak_mb() - imports_mb)
"""
)


def test_opening_does_not_grow_with_the_corpus_as_megatrons_does(tmp_path: Path) -> None:
    """Both open 1e10 tokens, whose ids are a hole, for the first time; Megatron writes index files."""
    pytest.importorskip("megatron.core")
    data, cache = tmp_path / "data", tmp_path / "cache"
    hollow_tokens(data, documents=12_500_000, document_tokens=800)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def opened(program: str, *arguments: Path) -> tuple[float, float]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        _, cpu_s, more_mb = map(float, done.stdout.split()[-3:])
        return cpu_s, more_mb

    theirs_s, theirs_mb = opened(_OPEN_THEIRS, data / "train-00000", cache)
    ours_s, ours_mb = opened(_OPEN, data)
    written_mb = sum(file.stat().st_size for file in cache.iterdir()) / 1e6
    print(
        f"\n1e10 tokens, CPU time: ours {ours_s:.3f} s, {ours_mb:.0f} MB; Megatron's GPTDataset "
        f"{theirs_s:.2f} s, {theirs_mb:.0f} MB, and {written_mb:.0f} MB of index files"
    )
    assert ours_s < theirs_s / 4
    assert ours_mb < theirs_mb / 4
