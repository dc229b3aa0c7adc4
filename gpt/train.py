"""The worker: from torchrun's environment to an attempt's result. `python -m gpt.train RUN_DIR`

It joins the process group, claims the attempt, checks the nodes, trains (gpt.training.trainer) and records
how the attempt ended. It never retries and never falls back: a crash ends the process, torchrun starts the
next attempt, and that one continues from the newest checkpoint.
"""

# ruff: noqa: E402 - the handlers must stand before torch's import, which takes seconds
import os
import sys
import time
import traceback
from contextlib import suppress

from gpt.run.events import Event, record_event
from gpt.run.heartbeat import WAITING, Heartbeat
from gpt.run.process_control import die_with_parent
from gpt.run.stop import StopFlag

STOP, HEARTBEAT = StopFlag(), Heartbeat()
if __name__ == "__main__":
    die_with_parent()
    STOP.install()
    HEARTBEAT.beat(0, "importing", is_starting=True)
_STARTED = time.monotonic()

from pathlib import Path

import torch.distributed as dist

from data_pipeline.errors import LaunchError, OutlastError
from gpt.config.run import RunConfig
from gpt.distributed.world import World, from_first, join
from gpt.run import record
from gpt.run.attempts import Superseded, failures_in_a_row
from gpt.run.environment import WorkerEnvironment
from gpt.run.exit_codes import ExitCode, exit_code_of
from gpt.run.failure_policy import Action, Trigger, action_on
from gpt.run.run_dir import RunDir
from gpt.training import attempt as attempts
from gpt.training.attempt import AttemptOutcome, log_line
from gpt.training.node_check import check_nodes
from gpt.training.trainer import StartClock, Trainer


def main(path: Path) -> None:
    """Take part in one attempt at the run in `path`; rank 0 leaves its result there."""
    run_dir = RunDir(path)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    environment = WorkerEnvironment.read()
    HEARTBEAT.beat(0, WAITING, is_starting=True)
    world = join(run.launch.collective_timeout_s, run.parallel.sequence, environment)
    clock = StartClock(run_dir, world, HEARTBEAT, _STARTED)
    clock.lap("imports and rendezvous")
    try:
        number = attempts.claim(run_dir, world, environment)
    except Superseded as error:  # a failure would be answered by a restart
        log_line(str(error))
        return
    HEARTBEAT.attempt = number
    if world.is_first:
        STOP.watch(run_dir.stop)
    outcome = None
    try:
        outcome = _give_up(run, run_dir, world, number)
        if outcome is None and run.launch.node_check:
            outcome = _leave_bad_nodes(run_dir, world, number, environment)
            clock.lap("node check")
        outcome = outcome or Trainer(run, run_dir, world, number, clock, STOP).train()
    except Superseded as error:  # not a file of the run is ours to write any more
        log_line(str(error))
    except OutlastError as error:  # agreed upon: every rank raises it
        outcome = AttemptOutcome(exit_code_of(error), str(error))
    if world.is_first and outcome is not None:
        log_line(f"attempt {number} ends with {outcome.exit_code}: {outcome.cause}")
        attempts.finish(run_dir, number, outcome)
    # All is written and agreed: a connection that another rank has closed already is no failure.
    with suppress(RuntimeError):
        dist.barrier(group=world.control)
        dist.destroy_process_group()


def _give_up(run: RunConfig, run_dir: RunDir, world: World, number: int) -> AttemptOutcome | None:
    failures = from_first(world, failures_in_a_row(run_dir, number) if world.is_first else 0)
    if action_on(Trigger.ATTEMPT_FAILED, count=failures, limits=run.launch) is not Action.END:
        return None
    return AttemptOutcome(
        ExitCode.DO_NOT_RESTART,
        f"{failures} attempts in a row ended without a new checkpoint; the last one's output is in "
        f"attempts/{run_dir.attempt(number - 1).path.name}. `outlast resume` tries again once the cause is "
        "mended.",
    )


def _leave_bad_nodes(
    run_dir: RunDir, world: World, number: int, environment: WorkerEnvironment
) -> AttemptOutcome | None:
    """Look at the nodes; in a job that can be requeued elsewhere a bad one ends the attempt."""
    found = check_nodes(world, run_dir.attempt(number).path, environment.host)
    if world.is_first:
        gflops, mb = found.slowest_flops_per_second / 1e9, found.all_reduce_bytes_per_second / 1e6
        record_event(
            run_dir.events,
            Event.NODES_CHECKED,
            bad=found.bad,
            gflops=round(gflops),
            all_reduce_mb_per_s=round(mb),
        )
        for node, reason in found.bad.items():
            record.append(run_dir.bad_nodes, node=node, reason=reason, attempt=number)
    said = "; ".join(f"{node}: {reason}" for node, reason in found.bad.items())
    action = action_on(Trigger.NODE_FAILED_CHECK, can_requeue=environment.can_requeue)
    if found.bad and action is Action.REQUEUE_ELSEWHERE:
        return AttemptOutcome(ExitCode.STOPPED, f"bad nodes: {said}")
    if world.device_problem is not None:
        raise LaunchError(world.device_problem)
    if found.bad and world.is_first:
        log_line(f"warning: {said}")
    return None


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    # At once, either way. An orderly exit waits for collectives whose other side may be dead, and the agent
    # for it; and it tears C++ threads down, where torch 2.13 was seen to abort after all had been written:
    # the agent would take a finished attempt for a failed one and start another.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
