"""An attempt as its workers see it: they claim it together, and rank 0 records how it ends.

The launcher acts on the attempt's result.json, never on an exit code of torchrun.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.format import committed
from gpt.checkpoint.writer import remove_leftovers
from gpt.config.run import RunConfig
from gpt.distributed.world import World, agree, from_first, gather
from gpt.run.attempts import Superseded, claim_number, owner_of
from gpt.run.environment import WorkerEnvironment
from gpt.run.events import Event, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import retry_on_oserror
from gpt.run.records import Owner, Result, Worker
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.training.start_clock import StartClock

_EVENTS = {ExitCode.FINISHED: Event.FINISHED, ExitCode.STOPPED: Event.STOPPED}


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, and this worker in it."""

    run: RunConfig
    run_dir: RunDir
    world: World
    number: int
    clock: StartClock
    stop: StopFlag


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended."""

    exit_code: ExitCode
    cause: str
    step: int | None = None


def claim(run_dir: RunDir, world: World, environment: WorkerEnvironment) -> int:
    """Claim the next attempt for these workers and send each rank's output to the attempt's folder.

    Collective. Raises Superseded on every rank when another job has taken the run over.
    """
    agree(world, lambda: _refuse_if_taken_over(run_dir, environment) if world.is_first else None)
    host = environment.node_name or socket.gethostname()
    workers = gather(world, Worker(rank=world.rank, node=world.node, host=host, pid=os.getpid()))
    number = from_first(world, _claim_next(run_dir, world, environment, workers) if world.is_first else 0)
    attempt = run_dir.attempt(number)
    retry_on_oserror(lambda: attempt.node(world.node).mkdir(exist_ok=True))
    retry_on_oserror(lambda: _redirect(attempt.rank_log(world.node, world.rank)))
    return number


def _claim_next(run_dir: RunDir, world: World, environment: WorkerEnvironment, workers: list[Worker]) -> int:
    """Claim the next number and write its owner at once, so that every attempt has an owner."""
    remove_leftovers(run_dir.checkpoints)  # first of all, because a full disk needs the room
    number = retry_on_oserror(lambda: claim_number(run_dir))
    remove_leftovers(run_dir.checkpoints)  # of an older copy, which can no longer commit
    checkpoints = committed(run_dir.checkpoints)
    owner = Owner(
        attempt=number,
        time=time.time(),
        host=workers[world.rank].host,
        job=environment.job,
        job_run=environment.job_run,
        world_size=world.size,
        checkpoint_step=checkpoints[-1][0] if checkpoints else 0,
        workers=tuple(workers),
    )
    retry_on_oserror(lambda: owner.write(run_dir.attempt(number).owner))
    record_event(
        run_dir.events, Event.ATTEMPT_STARTED, attempt=number, world_size=world.size, host=owner.host
    )
    return number


def finish(run_dir: RunDir, attempt: int, outcome: AttemptOutcome) -> None:
    """Record how the attempt ended. Rank 0 calls this once, at the end."""
    code, cause = outcome.exit_code, outcome.cause
    event = _EVENTS.get(code, Event.FAILED)
    record_event(run_dir.events, event, attempt=attempt, exit_code=code, cause=cause, step=outcome.step)
    result = Result(exit_code=code, cause=cause)
    retry_on_oserror(lambda: result.write(run_dir.attempt(attempt).result))


def log_line(text: str) -> None:
    """Print a line into this rank's log; a full disk is ignored."""
    with suppress(OSError):
        print(text, flush=True)


def _refuse_if_taken_over(run_dir: RunDir, environment: WorkerEnvironment) -> None:
    """Raise Superseded when another job has made an attempt since this job run began.

    Otherwise an older copy of the run, cut off for a while, would claim the newest number and become the run.
    """
    after = environment.after_attempt
    if after is None:
        return
    for number in run_dir.attempt_numbers():
        owner = owner_of(run_dir, number) if number > after else None
        if owner is not None and (owner.job, owner.job_run) != (environment.job, environment.job_run):
            raise Superseded(number, owner.job)


def _redirect(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
