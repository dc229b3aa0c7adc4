"""`outlast replay`: compute steps of a run again on this machine and compare them with its record."""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data_pipeline.errors import ConfigError, LaunchError
from gpt.checkpoint.format import committed
from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.events import Event, read_events
from gpt.run.json_file import write_json
from gpt.run.records import Owner
from gpt.run.run_dir import RunDir
from launcher.runs.code_snapshot import python_module
from launcher.runs.store import open_run, read_config

# How far a number may be from the record when the sums are added in another order.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
_COMPARED = ("data/digest", "train/lr", "train/loss", "train/grad_norm")
_LABELS = {
    "data/digest": "data",
    "train/lr": "rate",
    "train/loss": "loss",
    "train/grad_norm": "gradient norm",
}


@dataclass(frozen=True)
class Difference:
    """One number of a step as it was recorded and as it was computed again."""

    step: int
    name: str
    recorded: float
    computed: float

    @property
    def relative(self) -> float:
        """The difference relative to the recorded value; infinite when only one of them is finite."""
        if self.recorded == self.computed or (math.isnan(self.recorded) and math.isnan(self.computed)):
            return 0.0
        difference = abs(self.recorded - self.computed) / max(abs(self.recorded), 1e-300)
        return difference if math.isfinite(difference) else math.inf


def replay(folder: str, step: int, last: int | None, processes: int | None) -> int:
    """Compute steps `step` to `last` again; 0 when they agree with the record, 1 when they do not."""
    run = open_run(folder)
    last = step if last is None else last
    if last < step:
        raise ConfigError(f"--to {last}: it is before --step {step}. Give a later step, or leave --to out.")
    config = read_config(run)
    lines = {line["step"]: line for line in record.read_steps(run.metrics) if step <= line["step"] <= last}
    if missing := [number for number in range(step, last + 1) if number not in lines]:
        raise ConfigError(
            f"step {missing[0]} is not in the record of {run.path}. Give steps that the run has taken."
        )
    _refuse_other_config(run, lines[step]["time"])
    start = max((number for number, _ in committed(run.checkpoints) if number < step), default=0)
    if start == 0 and any(True for _ in read_events(run.events, Event.FORKED, Event.IMPORTED)):
        raise ConfigError(
            f"{run.path} started from given weights, and no checkpoint from before step {step} is left. Give "
            "a later --step."
        )
    count = processes or _default_processes(run, config)
    if problem := config.batch_problem(count):
        raise ConfigError(f"--processes {count}: {problem}")
    click.echo(
        f"computing steps {start + 1} to {last} again in {count} process{'es' if count > 1 else ''}, from "
        + (f"the checkpoint of step {start}" if start else "the initial weights"),
        err=True,
    )
    found = [line for line in _computed(run, config, start, last, count) if line["step"] >= step]
    differences = [
        Difference(line["step"], name, _number(lines[line["step"]].get(name)), _number(line[name]))
        for line in found
        for name in _COMPARED
        if name in lines[line["step"]]
    ]
    return _report(differences, TOLERANCES[config.precision])


def _refuse_other_config(run: RunDir, time: float) -> None:
    """Steps that were taken under another config cannot be computed with the present one."""
    for event in read_events(run.events, Event.CONFIG_CHANGED):
        if event["time"] > time:
            raise ConfigError(
                f"the config of {run.path} was changed after this step was taken, so it cannot be computed "
                "again. Give a step from after the change."
            )


def _default_processes(run: RunDir, config: RunConfig) -> int:
    """As many processes as the newest attempt had, if this machine has a core for each; else the fewest."""
    numbers = run.attempt_numbers()
    owner = Owner.read_or_none(run.attempt(numbers[-1]).owner) if numbers else None
    fewest = config.parallel.sequence
    if owner is None or owner.world_size > (os.cpu_count() or 1):
        return fewest
    return owner.world_size


@contextmanager
def _scratch(run: RunDir, config: RunConfig, start: int) -> Iterator[RunDir]:
    """A run directory that has nothing but the config, the events and one checkpoint; it is removed."""
    with tempfile.TemporaryDirectory(prefix="outlast-replay-") as folder:
        scratch = RunDir(Path(folder))
        scratch.checkpoints.mkdir()
        content = config.model_dump(mode="json")
        content["checkpoint"] = {**content["checkpoint"], "mirror": None}
        write_json(scratch.config, content)
        if run.events.exists():
            scratch.events.write_bytes(run.events.read_bytes())
        for number, checkpoint in committed(run.checkpoints):
            if number == start:
                (scratch.checkpoints / checkpoint.name).symlink_to(checkpoint, target_is_directory=True)
        yield scratch


def _computed(
    run: RunDir, config: RunConfig, start: int, last: int, processes: int
) -> Iterator[Mapping[str, Any]]:
    """The numbers of each step, while they are computed."""
    with _scratch(run, config, start) as scratch, tempfile.TemporaryFile("w+") as errors:
        command = python_module(
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "-m",
            "gpt.replay",
            str(scratch.path),
            str(start),
            str(last),
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            count = 0
            for text in child.stdout:
                line = _object(text)
                if "error" in line:
                    raise ConfigError(str(line["error"]))
                if "step" in line:
                    count += 1
                    yield line
        if child.returncode != 0 or count < last - start:
            errors.seek(0)
            tail = "".join(errors.readlines()[-20:])
            raise LaunchError(f"the steps could not be computed (exit code {child.returncode}):\n{tail}")


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a line; empty for any other output."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: float | None) -> float:
    """A number of the record, where null means that it was not finite."""
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _report(differences: Sequence[Difference], tolerance: float) -> int:
    """Print what was compared; 0 when everything agrees."""
    wrong = [d for d in differences if d.relative > (0.0 if d.name == "data/digest" else tolerance)]
    steps = sorted({d.step for d in differences})
    for name in _COMPARED:
        own = [d for d in differences if d.name == name]
        if not own:
            continue
        worst = max(own, key=lambda d: d.relative)
        if worst.relative == 0.0:
            verdict = "equal"
        else:
            verdict = f"differs by {worst.relative:.2g} at step {worst.step} "
            verdict += f"({worst.recorded:.9g} recorded, {worst.computed:.9g} computed)"
        click.echo(f"{_LABELS[name]:<15}{verdict}")
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    if wrong:
        first = wrong[0]
        click.echo(
            f"{span}: NOT as recorded; the first difference is the {_LABELS[first.name]} of step {first.step}"
        )
        return 1
    is_equal = all(d.relative == 0.0 for d in differences)
    click.echo(f"{span}: as recorded, " + ("bit for bit" if is_equal else f"within {tolerance:g}"))
    return 0
