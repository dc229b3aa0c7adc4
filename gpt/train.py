"""The worker: from torchrun's environment to an attempt's result. `python -m gpt.train RUN_DIR`

The worker joins the process group, claims the attempt, checks the nodes, trains (gpt.training.trainer) and
records how the attempt ended. It never retries and never falls back: a crash ends the process, torchrun
starts the next attempt, and that attempt continues from the newest checkpoint.
"""

# ruff: noqa: E402 - the signal handlers must be set before torch is imported, which takes seconds
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

from data_pipeline.errors import OutlastError
from gpt.config.run import RunConfig
from gpt.distributed.world import agree, barrier, from_first, join
from gpt.run.attempts import AttemptRemoved, Superseded, failures_in_a_row
from gpt.run.bad_nodes import record_bad_node
from gpt.run.environment import WorkerEnvironment
from gpt.run.exit_codes import ExitCode, exit_code_of
from gpt.run.failure_policy import Action, Trigger, action_on
from gpt.run.records import BadNode
from gpt.run.run_dir import RunDir
from gpt.training.attempt import Attempt, AttemptOutcome, claim, finish, log_line
from gpt.training.node_check import check_nodes
from gpt.training.numerics import set_rounding
from gpt.training.setup import set_up
from gpt.training.start_clock import StartClock


def main(path: Path) -> None:
    """Take part in one attempt at the run in `path`; rank 0 writes its result there."""
    run_dir = RunDir(path)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    environment = WorkerEnvironment.read()
    set_rounding(is_deterministic=run.deterministic)
    HEARTBEAT.beat(0, WAITING, is_starting=True)
    world = join(run.launch.collective_timeout_s, run.parallel.sequence, environment)
    clock = StartClock(run_dir, world, HEARTBEAT, _STARTED)
    clock.lap("imports and rendezvous")
    try:
        number = claim(run_dir, world, environment)
    except Superseded as error:  # not a failure: torchrun would restart the workers
        log_line(str(error))
        return
    HEARTBEAT.attempt = number
    if world.is_first:
        STOP.watch(run_dir.stop)
    attempt = Attempt(run, run_dir, world, number, clock, STOP)
    outcome = None
    try:
        outcome = _end_after_failures(attempt)
        if outcome is None and run.launch.node_check:
            outcome = _end_on_bad_nodes(attempt, environment)
            clock.lap("node check")
        if outcome is None:
            agree(world, world.require_device)
        outcome = outcome or set_up(attempt).train()
    except (Superseded, AttemptRemoved) as error:  # this attempt must not write any file of the run any more
        log_line(str(error))
    except OutlastError as error:  # every rank raises it
        outcome = AttemptOutcome(exit_code_of(error), str(error))
    if world.is_first and outcome is not None:
        log_line(f"attempt {number} ends with {outcome.exit_code}: {outcome.cause}")
        finish(run_dir, number, outcome)
    # Everything is written and agreed on, so a connection that another rank has already closed is no failure.
    with suppress(RuntimeError):
        barrier(world)
        dist.destroy_process_group()


def _end_after_failures(attempt: Attempt) -> AttemptOutcome | None:
    """The outcome when too many attempts in a row failed, else None."""
    run, run_dir, world, number = attempt.run, attempt.run_dir, attempt.world, attempt.number
    failures = from_first(world, failures_in_a_row(run_dir, number) if world.is_first else 0)
    if action_on(Trigger.ATTEMPT_FAILED, count=failures, limits=run.launch) is not Action.END:
        return None
    return AttemptOutcome(
        ExitCode.DO_NOT_RESTART,
        f"{failures} attempts in a row ended without a new checkpoint; the output of the last one is in "
        f"attempts/{run_dir.attempt(number - 1).path.name}. Fix the cause, then try again with "
        "`outlast resume`.",
    )


def _end_on_bad_nodes(attempt: Attempt, environment: WorkerEnvironment) -> AttemptOutcome | None:
    """Check the nodes. The outcome when one is bad and the job can be requeued on others, else None."""
    run_dir, world, number = attempt.run_dir, attempt.world, attempt.number
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
            record_bad_node(run_dir, BadNode(node=node, reason=reason, attempt=number))
    reasons = "; ".join(f"{node}: {reason}" for node, reason in found.bad.items())
    action = action_on(Trigger.NODE_FAILED_CHECK, can_requeue=environment.can_requeue)
    if found.bad and action is Action.REQUEUE_ELSEWHERE:
        return AttemptOutcome(ExitCode.STOPPED, f"bad nodes: {reasons}")
    if found.bad and world.is_first:
        log_line(f"warning: {reasons}")
    return None


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    # Exit at once in either case. An orderly exit waits for collectives whose other side may be dead, and
    # makes the agent wait too. It also destroys C++ threads, where torch 2.13 was seen to abort after
    # everything had been written: the agent would treat a finished attempt as failed and start another one.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
