"""Attempts: each generation of workers claims a number, says who it is, and how it ended.

The number is claimed by mkdir, which one process alone can win, so that it also fences older copies of
the run. What the launcher acts on is result.json, never an exit code of torchrun.
"""

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import CheckpointError, ConfigError
from gpt.checkpoint.format import committed
from gpt.checkpoint.writer import remove_leftovers
from gpt.distributed.world import World, from_first, gather, together
from gpt.run.record import event
from gpt.run.run_dir import RunDir, patiently, read_json, write_json

FINISHED, FAILED, STOPPED, DO_NOT_RESTART = 0, 1, 75, 93


class Superseded(CheckpointError):
    """Another copy of the run has started since: this one must write nothing more."""


def claim(run_dir: RunDir, world: World) -> int:
    """This generation's number; from here on each rank writes its output into the attempt's folder.

    Raises Superseded, on every rank, where another job has taken the run over.
    """
    together(world, lambda: _refuse_if_taken_over(run_dir) if world.is_first else None)
    host = os.environ.get("OUTLAST_NODE_NAME") or socket.gethostname()
    workers = gather(world, {"rank": world.rank, "node": world.node, "host": host, "pid": os.getpid()})
    number = from_first(world, _claim_next(run_dir, world, workers) if world.is_first else 0)
    folder = run_dir.attempt(number) / f"node-{world.node}"
    patiently(lambda: folder.mkdir(exist_ok=True))
    patiently(lambda: _redirect(folder / f"rank-{world.rank:05d}.log"))
    return number


def _claim_next(run_dir: RunDir, world: World, workers: list[dict[str, Any]]) -> int:
    """The next number, with its owner's name on it at once: until then nobody can tell whose it is."""
    remove_leftovers(run_dir.checkpoints)  # before anything is written: a full disk needs the room
    number = patiently(lambda: _make_next(run_dir))
    remove_leftovers(run_dir.checkpoints)  # an older copy that was about to commit is now too late
    checkpoints = committed(run_dir.checkpoints)
    owner = {
        "attempt": number,
        "time": time.time(),
        "host": workers[world.rank]["host"],
        "job": os.environ.get("OUTLAST_JOB"),
        "turn": _turn(),
        "world_size": world.size,
        "checkpoint_step": checkpoints[-1][0] if checkpoints else 0,
        "workers": workers,
    }
    patiently(lambda: write_json(run_dir.attempt(number) / "OWNER.json", owner))
    event(run_dir.events, "attempt_started", attempt=number, world_size=world.size, host=owner["host"])
    return number


def failures_in_a_row(run_dir: RunDir, attempt: int) -> int:
    """How many attempts of this job, just before `attempt`, died with no newer checkpoint than now.

    One that left no result when its turn of the job ended was ended from outside (preempted, its node
    lost): that says nothing against the run.
    """
    owner = _owner(run_dir, attempt)
    count = 0
    for number in reversed([n for n in run_dir.attempt_numbers() if n < attempt]):
        earlier = _owner(run_dir, number)
        is_same = all(earlier.get(key) == owner.get(key) for key in ("job", "checkpoint_step"))
        result = _read(run_dir.attempt(number) / "result.json")
        if result.get("exit_code", FAILED) != FAILED or (earlier and not is_same):
            break
        if result or not earlier or earlier.get("turn") == owner.get("turn"):
            count += 1
    return count


def finish(run_dir: RunDir, attempt: int, exit_code: int, cause: str, step: int | None = None) -> None:
    """Say how the attempt ended, for the launcher and for people. Rank 0 calls this once, at the end."""
    name = {FINISHED: "finished", STOPPED: "stopped"}.get(exit_code, "failed")
    event(run_dir.events, name, attempt=attempt, exit_code=exit_code, cause=cause, step=step)
    result = {"exit_code": exit_code, "cause": cause}
    patiently(lambda: write_json(run_dir.attempt(attempt) / "result.json", result))


def say(text: str) -> None:
    """A line in this rank's log, which may lie on a full disk."""
    with suppress(OSError):
        print(text, flush=True)


def is_superseded(run_dir: RunDir, attempt: int) -> bool:
    """Whether another attempt has started since `attempt` did: this one is then no longer the run."""
    return max(run_dir.attempt_numbers(), default=attempt) > attempt


def _make_next(run_dir: RunDir) -> int:
    run_dir.attempts.mkdir(exist_ok=True)
    while True:
        number = max(run_dir.attempt_numbers(), default=0) + 1
        try:
            run_dir.attempt(number).mkdir()
        except FileExistsError:
            continue
        return number


def _refuse_if_taken_over(run_dir: RunDir) -> None:
    """Raise Superseded when another job has made an attempt since this turn of this one began.

    A copy of the run that was cut off and comes back would otherwise claim the newest number, and so pass
    for the run.
    """
    after = os.environ.get("OUTLAST_AFTER_ATTEMPT")
    if after is None:
        return
    for number in run_dir.attempt_numbers():
        owner = _owner(run_dir, number) if number > int(after) else {}
        if owner and (owner.get("job"), owner.get("turn")) != (os.environ.get("OUTLAST_JOB"), _turn()):
            raise Superseded(f"attempt {number} of {owner.get('job')} has taken the run over.")


def _turn() -> int:
    """How often the job was put back in the queue before these workers started."""
    return int(os.environ.get("OUTLAST_TURN", "0"))


def _owner(run_dir: RunDir, attempt: int) -> dict[str, Any]:
    return _read(run_dir.attempt(attempt) / "OWNER.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except (OSError, ConfigError):
        return {}


def _redirect(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
