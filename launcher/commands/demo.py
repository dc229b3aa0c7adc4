"""`outlast demo`: prepares data, trains a small GPT, kills a worker on the way, scores and samples the model.

The demo uses the same code as any other run: `prepare`, `launch` and the local scheduler. It reports only
what it has measured, and fails with exit code 1 when the kill does not lead to a restart or when the model
does not beat gzip.
"""

import gzip
import lzma
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from data_pipeline.config_file import validate
from data_pipeline.corpus import packaged_corpus
from data_pipeline.dataset.manifest import Manifest
from data_pipeline.dataset.token_stream import TokenStream
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.run import record
from gpt.run.exit_codes import ExitCode
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.data import prepare_with_progress
from launcher.commands.fault_injector import FaultInjector, kill_worker
from launcher.commands.follow_job import start_and_follow
from launcher.commands.launch import command_line
from launcher.commands.model_tools import sample_command
from launcher.commands.plan import show_warnings
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.preflight.plan import plan
from launcher.runs.recipes import recipe_path, run_tables
from launcher.runs.store import create_run, make_next_run_folder, next_run_folder
from launcher.units import duration, size

PROMPT = "And it came to pass"
VAL_FRACTION = 0.05
_STEPS_AFTER_SAVE = 5  # the kill then destroys five steps, which the restart has to train again


def demo(out: Path) -> int:
    """Run the demo in folder `out`; the exit code."""
    started = time.monotonic()
    out = absolute(out, "--out")
    _stage(1, "Prepare: turn text into token shards")
    data = out / "data"
    manifest = _prepare(data)

    _stage(2, "Launch: check the run, then start two training processes")
    settings = [f"data.path={data}", f"evaluation.tokens={manifest.val_tokens}"]
    tables, source = run_tables(str(recipe_path("demo")), settings)
    folder = next_run_folder("demo", out / "runs")
    request = examine(tables, source, ClusterConfig(kind="local", processes_per_node=2), folder)
    show_warnings(request)
    needs = plan(request.config, request.cluster, request.train_tokens)
    model = request.config.model
    _print(
        f"A GPT with {needs.parameters:,} parameters ({model.n_layers} layers, width {model.d_model}, "
        f"RMSNorm, RoPE, SwiGLU) trains on {needs.tokens:,} tokens in {needs.steps} steps.",
        f"DeepSpeed ZeRO-{request.config.zero.stage} shards the optimizer state over {needs.world_size} "
        f"processes ({request.config.precision}, gloo). A checkpoint takes {size(needs.checkpoint_bytes)}.",
    )
    run = create_run(make_next_run_folder("demo", folder.parent), request, command_line())
    _print(f"Run directory: {run.path}")

    _stage(3, "Train: one worker is killed on the way")
    outcome, fault = _train_with_a_kill(run, request.config.total_steps)
    if outcome.exit_code != ExitCode.FINISHED:
        _print(f"The run did not finish: {outcome.cause}")
        return outcome.exit_code
    problems = [problem for problem in (_restart_problem(run, fault),) if problem]

    _stage(4, "Score: compress text that the model has never seen")
    problems += _score(run, data, manifest)

    _stage(5, f"Sample: let the model continue {PROMPT!r}")
    command = sample_command(run.path, PROMPT, max_tokens=120, temperature=0.7, seed=1)
    sampled = subprocess.run(command, capture_output=True, text=True)
    if sampled.returncode != 0:
        problems.append(f"sampling failed:\n{sampled.stderr.rstrip()}")
    _print(*sampled.stdout.strip().splitlines())

    click.echo()
    for problem in problems:
        click.echo(f"FAILED: {problem}")
    # The examples use the path that was typed when the shell does not find `outlast` by its name.
    outlast = "outlast" if shutil.which("outlast") else sys.argv[0]
    _print(
        f"{'Done' if not problems else 'Ended'} after {duration(time.monotonic() - started)}. Next, try:",
        f"  {outlast} status {run.path}    # state, loss and speed",
        f"  {outlast} logs {run.path}    # the output of each process",
        f"  {outlast} verify {run.path}    # read back every byte of every checkpoint",
        f"  {outlast} ui {run.path}    # the curves in MLflow",
        f"  {outlast} resume {run.path} --set schedule.total_steps={2 * needs.steps}    # train longer",
    )
    click.echo(run.path)
    return 1 if problems else 0


def _prepare(data: Path) -> Manifest:
    corpus = packaged_corpus()
    _print(
        f"A byte-level BPE tokenizer with 4,096 ids encodes the King James Bible, which is packaged with "
        f"Outlast ({size(corpus.stat().st_size)}).",
        f"{VAL_FRACTION:.0%} of the documents are held out for validation: the model never trains on them.",
    )
    tables = {
        "sources": [str(corpus)],
        "tokenizer": "outlast-4k",
        "out": str(data),
        "val_fraction": VAL_FRACTION,
        "workers": len(os.sched_getaffinity(0)),
    }
    manifest = prepare_with_progress(validate(DataPrepConfig, tables, "demo"))
    _print(
        f"The data set in {data} has {manifest.train_tokens:,} training tokens and {manifest.val_tokens:,} "
        "validation tokens."
    )
    return manifest


def _train_with_a_kill(run: RunDir, total_steps: int) -> tuple[JobOutcome, FaultInjector]:
    fault = FaultInjector(lambda: kill_worker(run), steps_after_save=_STEPS_AFTER_SAVE)
    return start_and_follow(run, total_steps, "launch", fault.observe), fault


def _restart_problem(run: RunDir, fault: FaultInjector) -> str | None:
    """Why the kill did not lead to a restart from a checkpoint, or None; prints what happened."""
    if fault.killed_step is None:
        return "the run ended before a worker could be killed"
    if fault.resumed_step is None:
        return "no attempt resumed from a checkpoint after the kill"
    steps = [int(line["step"]) for line in record.read_steps(run.metrics)]
    if steps != list(range(1, len(steps) + 1)):
        return "the record does not hold every step exactly once"
    _print(
        f"The worker was killed after step {fault.killed_step}. Outlast restarted the workers from the "
        f"checkpoint of step {fault.resumed_step}.",
        f"The record holds each of the {len(steps)} steps exactly once.",
    )
    return None


def _score(run: RunDir, data: Path, manifest: Manifest) -> list[str]:
    scores = [line for line in record.read_steps(run.metrics) if line.get("val/loss") is not None]
    if not scores:
        return ["the run recorded no finite val/loss"]
    text = held_out_text(data, manifest)
    # The model does not predict the first token of a document. Count it at the cost of a uniform guess.
    documents = sum(shard.documents for shard in manifest.val)
    nats = float(scores[-1]["val/loss"]) * (manifest.val_tokens - documents)
    nats += documents * math.log(manifest.encoding.vocab_size)
    ours = nats / math.log(2) / len(text)
    rows = {
        "this model": ours,
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
    _print(f"The held-out text has {len(text):,} bytes. Bits per byte, lower is better:")
    for name, bits in rows.items():
        _print(f"  {name:<12}{bits:.3f}")
    if ours >= rows["gzip -9"]:
        return [f"the model needs {ours:.3f} bits per byte, gzip needs {rows['gzip -9']:.3f}"]
    return []


def held_out_text(data: Path, manifest: Manifest) -> bytes:
    """The text of the validation split: its documents in the order in which the model reads them."""
    encoding = load_encoding(data)
    ids = np.empty(manifest.val_tokens, np.int64)
    TokenStream(data, manifest, "val").read(0, ids)
    return encoding.decode(ids[ids != encoding.end_of_text].tolist()).encode()


def _stage(number: int, title: str) -> None:
    click.echo(f"\n[{number}/5] {title}")


def _print(*lines: str) -> None:
    for line in lines:
        click.echo(f"      {line}")
