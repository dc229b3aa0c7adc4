"""`outlast demo`: the whole road in a few minutes, explained to a stranger, with a real kill on the way.

Everything here goes through the same code as anyone's run: `prepare`, `launch`, the local executor. What is
staged is the kill alone. It claims nothing that it did not just measure, and fails (exit 1) when the kill
did not lead to a restart or the model does not beat gzip.
"""

import gzip
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from data_pipeline.config_file import validate
from data_pipeline.dataset.manifest import Manifest
from data_pipeline.dataset.token_stream import TokenStream
from data_pipeline.prepare.pipeline import DataPrepConfig
from data_pipeline.sources.documents import packaged_corpus
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.run import record
from gpt.run.events import Event
from gpt.run.json_file import read_json
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.data import prepare_with_progress
from launcher.commands.launch import command_line, show_warnings
from launcher.commands.model_tools import sample_command
from launcher.commands.progress import Attendance, Display, Follower, Update, duration, outcome_of
from launcher.commands.submit import submit
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.preflight.plan import plan
from launcher.runs.recipes import recipe_path, run_tables
from launcher.runs.store import create_run, next_run_folder
from launcher.units import size

PROMPT = "And it came to pass"
VAL_FRACTION = 0.05
_STEPS_AFTER_SAVE = 5  # so that the kill destroys work which the restart must do again


@dataclass
class Saboteur:
    """Kills one worker of a run, once: some steps after the first checkpoint."""

    run: RunDir
    display: Display
    saved_step: int | None = None
    killed_attempt: int | None = None
    killed_step: int | None = None

    def watch(self, update: Update) -> None:
        """See what happened, and strike when it is time."""
        for event in update.events:
            if event["event"] == Event.CHECKPOINT_SAVED and self.saved_step is None:
                self.saved_step = int(event["step"])
        if self.saved_step is None or self.killed_attempt is not None or not update.metrics:
            return
        step = int(update.metrics[-1]["step"])
        if step >= self.saved_step + _STEPS_AFTER_SAVE:
            self._kill(step)

    def _kill(self, step: int) -> None:
        attempt = self.run.attempt_numbers()[-1]
        owner = read_json(self.run.attempt(attempt).owner)
        assert owner is not None, "a step was made without an owner"
        worker = max(owner["workers"], key=lambda worker: int(worker["rank"]))
        os.kill(worker["pid"], signal.SIGKILL)
        self.killed_attempt, self.killed_step = attempt, step
        self.display.note(
            f">>> kill -9 of worker {worker['rank']} (process {worker['pid']}) after step {step}; the last "
            f"checkpoint is that of step {self.saved_step}. Nobody will help."
        )


def demo(out: Path) -> int:
    """Run the demo in folder `out`; the exit code."""
    started = time.monotonic()
    out = absolute(out)
    _stage(1, "Prepare: text becomes token shards")
    data = out / "data"
    manifest = _prepare(data)

    _stage(2, "Launch: check everything, then start two processes")
    settings = [f"data.path={data}", f"evaluation.tokens={manifest.val_tokens}"]
    tables, source = run_tables(str(recipe_path("demo")), settings)
    folder = next_run_folder("demo", out / "runs")
    request = examine(tables, source, ClusterConfig(kind="local", processes_per_node=2), folder)
    show_warnings(request)
    needs = plan(request.config, request.cluster, request.train_tokens)
    model = request.config.model
    _say(
        f"A GPT with {needs.parameters:,} parameters ({model.n_layers} layers, width {model.d_model}: "
        f"RMSNorm, RoPE, SwiGLU) reads {needs.tokens:,} tokens in {needs.steps} steps.",
        f"DeepSpeed ZeRO-{request.config.zero.stage} shards the optimizer's state over {needs.world_size} "
        f"processes ({request.config.precision}, gloo). A checkpoint takes {size(needs.checkpoint_bytes)}.",
    )
    run = create_run(folder, request, command_line())
    _say(f"Run directory: {run.path}")

    _stage(3, "Train, and lose a worker on the way")
    outcome, saboteur = _train_with_a_kill(run, request.config.total_steps)
    if outcome.exit_code != 0:
        _say(f"The run did not finish: {outcome.cause}")
        return outcome.exit_code
    problems = [problem for problem in (_restart_problem(run, saboteur),) if problem]

    _stage(4, "Score: bits per byte of text that it never saw")
    problems += _score(run, data, manifest)

    _stage(5, f"Sample: how it continues {PROMPT!r}")
    command = sample_command(run.path, PROMPT, max_tokens=120, temperature=0.7, seed=1)
    sampled = subprocess.run(command, capture_output=True, text=True)
    if sampled.returncode != 0:
        problems.append(f"sampling failed:\n{sampled.stderr.rstrip()}")
    _say(*sampled.stdout.strip().splitlines())

    click.echo()
    for problem in problems:
        click.echo(f"FAILED: {problem}")
    # As this command was typed, where the shell would not find it by its name alone.
    outlast = "outlast" if shutil.which("outlast") else sys.argv[0]
    _say(
        f"{'Done' if not problems else 'Ended'} in {duration(time.monotonic() - started)}. Now:",
        f"  {outlast} status {run.path}",
        f"  {outlast} logs {run.path}          what each process said",
        f"  {outlast} verify {run.path}        every byte of every checkpoint",
        f"  {outlast} ui {run.path}            the curves in MLflow",
        f"  {outlast} resume {run.path} --set schedule.total_steps={2 * needs.steps}    train on",
    )
    click.echo(run.path)
    return 1 if problems else 0


def _prepare(data: Path) -> Manifest:
    corpus = packaged_corpus()
    _say(
        f"The King James Bible, packaged with Outlast ({size(corpus.stat().st_size)}), is cut into tokens by "
        "a byte-level BPE of 4,096 ids.",
        f"{VAL_FRACTION:.0%} of the documents are held out: the model never trains on them.",
    )
    tables = {
        "sources": [str(corpus)],
        "tokenizer": "outlast-4k",
        "out": str(data),
        "val_fraction": VAL_FRACTION,
        "workers": len(os.sched_getaffinity(0)),
    }
    manifest = prepare_with_progress(validate(DataPrepConfig, tables, "demo"))
    _say(f"{manifest.train_tokens:,} tokens to train on, {manifest.val_tokens:,} held out: {data}")
    return manifest


def _train_with_a_kill(run: RunDir, total_steps: int) -> tuple[JobOutcome, Saboteur]:
    follower = Follower(run)
    job = submit(run, "launch")
    with Display(total_steps) as display, Attendance(run, display) as attendance:
        saboteur = Saboteur(run, display)
        for update in follower.updates(job):
            display.show(update)
            saboteur.watch(update)
            attendance.answer()
    return outcome_of(run, job), saboteur


def _restart_problem(run: RunDir, saboteur: Saboteur) -> str | None:
    """Why the kill did not lead to a restart from a checkpoint, or None; says what happened."""
    if saboteur.killed_attempt is None:
        return "the run ended before a worker could be killed"
    resumed = [
        event
        for event in record.read(run.events)
        if event["event"] == Event.RESUMED
        and event.get("attempt", saboteur.killed_attempt + 1) > saboteur.killed_attempt
    ]
    if run.attempt_numbers()[-1] == saboteur.killed_attempt or not resumed:
        return "no attempt continued from a checkpoint after the kill"
    steps = [int(line["step"]) for line in record.read(run.metrics)]
    if steps != list(range(1, len(steps) + 1)):
        return "the record does not hold every step exactly once"
    _say(
        f"Worker killed after step {saboteur.killed_step}; restarted by itself from the checkpoint of step "
        f"{resumed[0]['step']}; every one of the {len(steps)} steps stands in the record once."
    )
    return None


def _score(run: RunDir, data: Path, manifest: Manifest) -> list[str]:
    scores = [line for line in record.read(run.metrics) if "val/loss" in line]
    if not scores:
        return ["the run recorded no val/loss"]
    text = held_out_text(data, manifest)
    # The model does not score a document's first token; here each counts in full, as a plain id would.
    documents = sum(shard.documents for shard in manifest.val)
    nats = float(scores[-1]["val/loss"]) * (manifest.val_tokens - documents)
    nats += documents * math.log(manifest.encoding.vocab_size)
    ours = nats / math.log(2) / len(text)
    rows = {
        "this model": ours,
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
    _say(f"The held-out text has {len(text):,} bytes. Bits that each needs for one of them:")
    for name, bits in rows.items():
        _say(f"  {name:<12}{bits:.3f}")
    if ours >= rows["gzip -9"]:
        return [f"{ours:.3f} bits per byte do not beat gzip's {rows['gzip -9']:.3f}"]
    return []


def held_out_text(data: Path, manifest: Manifest) -> bytes:
    """The text of the validation split, its documents one after the other as the model sees them."""
    encoding = load_encoding(data)
    ids = np.empty(manifest.val_tokens, np.int64)
    TokenStream(data, manifest, "val").read(0, ids)
    return encoding.decode(ids[ids != encoding.end_of_text].tolist()).encode()


def _stage(number: int, title: str) -> None:
    click.echo(f"\n[{number}/5] {title}")


def _say(*sentences: Any) -> None:
    for sentence in sentences:
        click.echo(f"      {sentence}")
