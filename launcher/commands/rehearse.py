"""`outlast rehearse`: proves on the user's own cluster that a run survives, before the real one is queued.

A short version of the run is trained twice: undisturbed, and killed, resumed, stopped and resumed on
another number of processes. Every step must have read the same sequences; the losses must be the same bits
for as long as the number of processes is the same, and the same within rounding afterwards.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import LaunchError
from gpt.run import record
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.launch import command_line, show_warnings
from launcher.commands.progress import Attendance, Display, Follower, outcome_of
from launcher.commands.submit import submit
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.recipes import run_tables
from launcher.runs.stop_request import request_stop
from launcher.runs.store import create_run, next_run_folder, put_submission
from launcher.scheduler.registry import scheduler_of

_PUSH_S = 3.0
# Sums in another order: measured 3e-7 relative in fp32 after a few steps, in bf16 a rounding is 4e-3.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One thing that was to be shown, and what was seen."""

    name: str
    is_good: bool
    seen: str


def rehearse(run: str, cluster: str, overrides: Sequence[str], folder: Path | None, steps: int) -> int:
    """Rehearse `run` on `cluster` in `folder`; 0 when all went as it must, else 1."""
    folder = absolute(folder or next_run_folder("rehearsal"))
    tables, source = run_tables(run, overrides)
    short = _shortened(tables, steps)
    requests = {name: examine(short, source, cluster, folder / name) for name in ("undisturbed", "disturbed")}
    request = requests["disturbed"]
    show_warnings(request)
    other = other_cluster(request)
    if other is None:
        click.echo("warning: no other number of processes divides the global batch; not rehearsed", err=True)
    runs = {name: create_run(folder / name, requests[name], command_line()) for name in requests}

    click.echo(f"[1/3] {steps} steps on {request.cluster.world_size} processes, undisturbed", err=True)
    _must_be(_watch(runs["undisturbed"], request, "launch", None), 0)
    click.echo("[2/3] the same, killed on the way", err=True)
    disturbed = runs["disturbed"]
    killer = Killer(disturbed, request.cluster, stop_at=2 * steps // 3 if other is not None else None)
    ended = _watch(disturbed, request, "launch", killer)
    if other is not None:
        _must_be(ended, ExitCode.STOPPED)
        click.echo(f"[3/3] resumed on {other.world_size} processes", err=True)
        resumed = Request(request.config, other, request.manifests, request.warnings)
        put_submission(disturbed, resumed, command_line())
        ended = _watch(disturbed, resumed, "resume", None)
    _must_be(ended, 0)

    checks = compare(runs["undisturbed"], disturbed, request, killer)
    _show(checks)
    click.echo(folder)
    return 0 if all(check.is_good for check in checks) else 1


def other_cluster(request: Request) -> ClusterConfig | None:
    """`request.cluster` with another number of processes on which its global batch can be cut, or None."""
    cluster = request.cluster
    candidates: list[dict[str, Any]] = [{"nodes": nodes} for nodes in range(cluster.nodes - 1, 0, -1)]
    candidates += [
        {
            "nodes": 1,
            "processes_per_node": count,
            **({"gpus_per_node": count} if cluster.gpus_per_node else {}),
        }
        for count in range(cluster.processes - 1, 0, -1)
    ]
    for change in candidates:
        smaller = ClusterConfig(**{**cluster.model_dump(exclude_unset=True), **change})
        if request.config.batch_problem(smaller.world_size) is None:
            return smaller
    return None


class Killer:
    """Kills the run once, some steps after its first checkpoint, as hard as it can be done from here.

    Locally that is SIGKILL to a worker; in Slurm, whose processes are elsewhere, a requeue that asks nobody.
    """

    def __init__(self, run: RunDir, cluster: ClusterConfig, stop_at: int | None) -> None:
        self.run, self.cluster, self.stop_at = run, cluster, stop_at
        self.saved_step: int | None = None
        self.killed_step: int | None = None
        self.resumed_step: int | None = None
        self._next_push = 0.0

    def watch(self, events: Sequence[dict[str, Any]], step: int, say: Callable[[str], None]) -> None:
        """Look at what happened, and act when it is time."""
        for event in events:
            if event["event"] == Event.CHECKPOINT_SAVED and self.saved_step is None:
                self.saved_step = int(event["step"])
            if event["event"] == Event.RESUMED and self.killed_step is not None and self.resumed_step is None:
                self.resumed_step = int(event["step"])
        if self.saved_step is not None and self.killed_step is None and step > self.saved_step:
            self.killed_step = step
            say(f">>> killed after step {step}; the last checkpoint is that of step {self.saved_step}")
            self._kill()
        if self.killed_step is not None and self.resumed_step is None:
            self._push()
        if self.resumed_step is not None and self.stop_at is not None and step >= self.stop_at:
            request_stop(self.run, "the rehearsal")
            self.stop_at = None

    def _kill(self) -> None:
        scheduler = scheduler_of(self.cluster.kind)
        if scheduler.can_requeue:
            scheduler.interrupt(self._job_id())
            return
        owner = read_json(self.run.attempt(self.run.attempt_numbers()[-1]).owner)
        assert owner is not None
        os.kill(owner["workers"][-1]["pid"], signal.SIGKILL)

    def _push(self) -> None:
        """Have a requeued job start at once: Slurm sets the two minutes' wait when the old turn has ended."""
        if time.monotonic() >= self._next_push:
            self._next_push = time.monotonic() + _PUSH_S
            scheduler_of(self.cluster.kind).start_now(self._job_id())

    def _job_id(self) -> str:
        job = read_json(self.run.job)
        assert job is not None
        return str(job["job_id"])


def compare(undisturbed: RunDir, disturbed: RunDir, request: Request, killer: Killer) -> list[Check]:
    """What the two records show."""
    first, second = (
        {line["step"]: line for line in record.read(run.metrics)} for run in (undisturbed, disturbed)
    )
    steps = sorted(first)
    worlds = [event for event in record.read(disturbed.events) if event["event"] == Event.ATTEMPT_STARTED]
    resumes = [event for event in record.read(disturbed.events) if event["event"] == Event.RESUMED]
    changed_at = steps[-1]
    if worlds[-1]["world_size"] != worlds[0]["world_size"]:
        changed_at = int(resumes[-1]["step"])
    same = [step for step in steps if step <= changed_at]
    later = [step for step in steps if step > changed_at]
    checks = [
        Check(
            "killed, and continued from a checkpoint by itself",
            killer.resumed_step is not None,
            f"killed after step {killer.killed_step}, continued from step {killer.resumed_step}",
        ),
        Check("every step once", sorted(second) == steps, f"{len(second)} of {len(steps)} steps"),
        _equal("the same sequences at every step", first, second, steps, "data/digest"),
        _equal(f"the same losses, bit for bit, up to step {changed_at}", first, second, same, "train/loss"),
    ]
    if later:
        tolerance = LOSS_TOLERANCE[request.config.precision]
        off = max(
            abs(first[step]["train/loss"] - second[step]["train/loss"]) for step in later if step in second
        )
        name = f"the same losses within {tolerance:g} on {worlds[-1]['world_size']} processes"
        checks.append(
            Check(name, off <= tolerance, f"largest difference {off:.2g}, steps {later[0]}–{later[-1]}")
        )
    return checks


def _equal(
    name: str, first: dict[int, Any], second: dict[int, Any], steps: Sequence[int], metric: str
) -> Check:
    wrong = [step for step in steps if first[step].get(metric) != second.get(step, {}).get(metric)]
    return Check(name, not wrong, f"{len(steps)} steps" if not wrong else f"differs at step {wrong[0]}")


def _shortened(tables: dict[str, Any], steps: int) -> dict[str, Any]:
    """The run with `steps` steps, three checkpoints, and its warmup within them; its size stays."""
    schedule = {key: value for key, value in tables.get("schedule", {}).items() if key != "total_tokens"}
    warmup = min(int(schedule.get("warmup_steps", 0)), steps)
    return {
        **tables,
        "schedule": {**schedule, "total_steps": steps, "warmup_steps": warmup},
        "checkpoint": {"every_steps": max(1, steps // 4)},
        "evaluation": {**tables.get("evaluation", {}), "every_steps": steps},
        "tracking": {"enabled": False},
    }


def _watch(run: RunDir, request: Request, reason: str, killer: Killer | None) -> JobOutcome:
    """Submit and show the run until it ends."""
    follower = Follower(run)
    with Display(request.config.total_steps) as display, Attendance(run, display) as attendance:
        job = submit(run, reason)
        scheduler = scheduler_of(job.executor)
        if not scheduler.runs_here:
            title = scheduler.title
            display.note(f"{title} job {job.job_id}; it begins when {title} has nodes for it")
        step = 0
        for update in follower.updates(job):
            display.show(update)
            attendance.answer()
            if update.metrics:
                step = int(update.metrics[-1]["step"])
            if killer is not None:
                killer.watch(update.events, step, display.note)
    return outcome_of(run, job)


def _must_be(outcome: JobOutcome, exit_code: int) -> None:
    if outcome.exit_code != exit_code:
        raise LaunchError(f"the rehearsal's run ended with {outcome.exit_code}: {outcome.cause}")


def _show(checks: Sequence[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "seen"):
        table.add_column(heading, no_wrap=True)
    for check in checks:
        table.add_row("pass" if check.is_good else "FAIL", check.name, check.seen)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
