"""`outlast rehearse`: tests on the user's own cluster that a run survives failures.

A short version of the run is trained twice: once undisturbed, and once killed, recovered, stopped and resumed
on another number of processes. Both must read the same sequences at every step. Their losses must agree bit
for bit on the same number of processes, and within rounding afterwards.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import LaunchError
from gpt.run.environment import Variable
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.fault_injector import FaultInjector, kill_worker
from launcher.commands.follow_job import Observer, start_and_follow
from launcher.commands.launch import command_line
from launcher.commands.plan import show_warnings
from launcher.commands.record_follower import Update
from launcher.commands.rehearsal_checks import Check, compare
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.recipes import run_tables
from launcher.runs.store import create_run, make_next_run_folder, next_run_folder, put_submission
from launcher.scheduler.registry import scheduler_of
from launcher.units import processes

_STEPS_AFTER_SAVE = 1  # the kill then destroys work
_PUSH_S = 3.0  # repeated, because Slurm ignores it until the last job run has ended


def rehearse(run: str, cluster: str, overrides: Sequence[str], folder: Path | None, steps: int) -> int:
    """Rehearse `run` on `cluster` in `folder`; 0 when every check passes, else 1."""
    is_named = folder is not None
    folder = absolute(folder or next_run_folder("rehearsal"), "--run-dir")
    tables, source = run_tables(run, overrides)
    short = shortened(tables, steps)
    requests = {name: examine(short, source, cluster, folder / name) for name in ("undisturbed", "disturbed")}
    request = requests["disturbed"]
    show_warnings(request)
    other = other_cluster(request)
    if other is None:
        click.echo(
            "warning: no smaller number of processes divides the global batch; the rehearsal does not resize",
            err=True,
        )
    if not is_named:
        folder = make_next_run_folder("rehearsal")
    # The workers pause and stop at given steps, because quick steps would be over before a signal arrives.
    interruptions = {Variable.PAUSE_AT: _save_interval(steps) + _STEPS_AFTER_SAVE}
    if other is not None:
        interruptions[Variable.STOP_AT] = 2 * steps // 3
    requests["disturbed"] = _with_environment(request, interruptions)
    runs = {name: create_run(folder / name, requests[name], command_line()) for name in requests}

    click.echo(f"[1/3] training {steps} steps on {processes(request.cluster.world_size)}", err=True)
    _must_be(_train(runs["undisturbed"], request, "launch", None), ExitCode.FINISHED)
    click.echo("[2/3] training the same steps, with a kill on the way", err=True)
    disturbed = runs["disturbed"]
    disturbance = _Disturbance(disturbed, request.cluster)
    ended = _train(disturbed, request, "launch", disturbance.observe)
    if other is not None:
        _must_be(ended, ExitCode.STOPPED)
        click.echo(f"[3/3] resuming on {processes(other.world_size)}", err=True)
        resumed = Request(request.config, other, request.manifests, request.warnings)
        put_submission(disturbed, resumed, command_line())
        ended = _train(disturbed, resumed, "resume", None)
    _must_be(ended, ExitCode.FINISHED)

    checks = compare(runs["undisturbed"], disturbed, request, disturbance.fault)
    _show(checks)
    click.echo(folder)
    return 0 if all(check.is_good for check in checks) else 1


def other_cluster(request: Request) -> ClusterConfig | None:
    """`request.cluster` with fewer processes, among which the global batch divides evenly, or None."""
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


class _JobKill:
    """Kills a run as hard as is possible from here.

    A local run loses a worker to SIGKILL. The processes of a Slurm job run on other machines; the job is
    requeued without a chance to save.
    """

    def __init__(self, run: RunDir, cluster: ClusterConfig) -> None:
        self.run, self.cluster = run, cluster
        self._next_push = 0.0

    def kill(self) -> str:
        """Kill the run, and say what was killed."""
        scheduler = scheduler_of(self.cluster.kind)
        if scheduler.can_requeue:
            scheduler.interrupt(self._job_id())
            return "the job"
        return kill_worker(self.run)

    def push(self) -> None:
        """Start a requeued job at once; Slurm delays it by two minutes when its last job run has ended."""
        if time.monotonic() >= self._next_push:
            self._next_push = time.monotonic() + _PUSH_S
            scheduler_of(self.cluster.kind).start_now(self._job_id())

    def _job_id(self) -> str:
        job = read_json(self.run.job)
        assert job is not None
        return str(job["job_id"])


class _Disturbance:
    """Kills the run once, while it pauses after its first checkpoint."""

    def __init__(self, run: RunDir, cluster: ClusterConfig) -> None:
        self._job = _JobKill(run, cluster)
        self.fault = FaultInjector(self._job.kill, steps_after_save=_STEPS_AFTER_SAVE)

    def observe(self, update: Update, note: Callable[[str], None]) -> None:
        """Act on what is new in the record."""
        self.fault.observe(update, note)
        if self.fault.is_down:
            self._job.push()


def _save_interval(steps: int) -> int:
    return max(1, steps // 4)


def _with_environment(request: Request, variables: Mapping[Variable, int]) -> Request:
    """`request` with more environment variables for its workers."""
    cluster = request.cluster
    environment = cluster.environment | {name.value: str(value) for name, value in variables.items()}
    return replace(request, cluster=cluster.model_copy(update={"environment": environment}))


def shortened(tables: dict[str, Any], steps: int) -> dict[str, Any]:
    """The tables of the run with `steps` steps, a checkpoint each quarter, and no tracking.

    Whatever happens during the run also happens in the short one: the decay of the rate, and every stage of
    data.schedule and batch.warmup, as far as there are enough steps. The losses are compared bit for bit, so
    the short run is deterministic unless the run says otherwise.
    """
    schedule = {key: value for key, value in tables.get("schedule", {}).items() if key != "total_tokens"}
    cut = {"total_steps": steps}
    if decay := schedule.get("decay_steps"):
        cut["decay_steps"] = min(decay, max(1, steps // 3))
    if warmup := schedule.get("warmup_steps"):
        cut["warmup_steps"] = min(warmup, steps - cut.get("decay_steps", 0))
    short = {
        "deterministic": True,
        **tables,
        "schedule": {**schedule, **cut},
        "checkpoint": {"every_steps": _save_interval(steps)},
        "evaluation": {**tables.get("evaluation", {}), "every_steps": steps},
        "tracking": {"enabled": False},
    }
    if stages := tables.get("batch", {}).get("warmup"):
        stages = stages[: steps // 2]
        longest = steps // 2 // len(stages)
        cut_stages = [{**stage, "steps": min(int(stage.get("steps", 1)), longest)} for stage in stages]
        short["batch"] = {**tables["batch"], "warmup": cut_stages}
    if stages := tables.get("data", {}).get("schedule"):
        starts = [(number + 1) / (len(stages) + 1) for number in range(len(stages))]
        spread = [
            {**{key: value for key, value in stage.items() if key != "from_tokens"}, "from_progress": start}
            for stage, start in zip(stages, starts, strict=True)
        ]
        short["data"] = {**tables["data"], "schedule": spread}
    return short


def _train(run: RunDir, request: Request, reason: str, observe: Observer | None) -> JobOutcome:
    """Submit `run` and follow its job until it ends."""

    def say(job: Job) -> None:
        scheduler = scheduler_of(job.executor)
        if not scheduler.runs_here:
            title = scheduler.title
            click.echo(
                f"submitted {title} job {job.job_id}; it starts when {title} has nodes for it", err=True
            )

    # Saves that are due every few quick steps overlap; that says nothing about the run.
    quiet = (Event.CHECKPOINT_SKIPPED,)
    return start_and_follow(run, request.config.total_steps, reason, observe, say, quiet)


def _must_be(outcome: JobOutcome, exit_code: ExitCode) -> None:
    if outcome.exit_code != exit_code:
        raise LaunchError(f"a rehearsal run ended with exit code {int(outcome.exit_code)}: {outcome.cause}")


def _show(checks: Sequence[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "measured"):
        table.add_column(heading, no_wrap=True)
    for check in checks:
        table.add_row("pass" if check.is_good else "FAIL", check.name, check.seen)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
