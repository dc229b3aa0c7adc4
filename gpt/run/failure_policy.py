"""What follows a failure: one table from trigger to action, with the limit after which the run ends.

Workers and node tasks both decide with `action_on`. Adding a policy is adding a `Trigger` and its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gpt.run.exit_codes import ExitCode


class Trigger(StrEnum):
    """What happened, in the words of the README's table."""

    ATTEMPT_FAILED = "the workers of an attempt end without a new checkpoint"
    RANK_HUNG = "a rank makes no progress for launch.hang_timeout_s"
    HUNG_AT_START = "the workers hang before they belong to an attempt"
    CRASHED_AT_START = "the workers crash before they belong to an attempt"
    STARTED_IN_VAIN = "the workers crash or hang there while a stop is requested"
    NO_WORKERS = "torchrun has no workers for launch.hang_timeout_s"
    NODE_FAILED_CHECK = "a node fails the check before training"
    JOB_RUN_FAILED = "a job run ends with a failure"
    RUN_DIR_GONE = "the run directory is moved or deleted while the run is going"
    STOPPED_BY_SCHEDULER = "the scheduler preempts the job, or its time limit is near"
    STOPPED_BY_PERSON = "Ctrl-C, `outlast stop` or `scancel`"
    FINISHED = "the last step is done"
    CANNOT_CONTINUE = "no intact checkpoint, or the input is wrong"
    GRADIENT_NOT_FINITE = "the gradient of a step is not finite"


class Action(StrEnum):
    """What Outlast does about it."""

    RESTART_WORKERS = "restart the workers"
    REQUEUE = "requeue the job"
    REQUEUE_ELSEWHERE = "requeue the job, excluding the node"
    END_JOB_RUN = "end this job run as failed"
    END = "end the job"
    SKIP_UPDATE = "skip the update and train on"


@dataclass(frozen=True)
class Policy:
    """The action on a trigger; once it has happened `limit` times in a row, `beyond` instead."""

    action: Action
    limit: str | None = None  # a field of `table`
    beyond: Action = Action.END
    table: str = "launch"  # of the run config


POLICIES: Mapping[Trigger, Policy] = {
    Trigger.ATTEMPT_FAILED: Policy(Action.RESTART_WORKERS, limit="max_failures"),
    Trigger.RANK_HUNG: Policy(Action.RESTART_WORKERS),
    Trigger.HUNG_AT_START: Policy(Action.RESTART_WORKERS, limit="max_failures", beyond=Action.END_JOB_RUN),
    Trigger.CRASHED_AT_START: Policy(Action.RESTART_WORKERS, limit="max_failures", beyond=Action.END_JOB_RUN),
    Trigger.STARTED_IN_VAIN: Policy(Action.END_JOB_RUN),
    Trigger.NO_WORKERS: Policy(Action.END_JOB_RUN),
    Trigger.NODE_FAILED_CHECK: Policy(Action.REQUEUE_ELSEWHERE),
    Trigger.JOB_RUN_FAILED: Policy(Action.REQUEUE, limit="max_failures"),
    Trigger.RUN_DIR_GONE: Policy(Action.END),
    Trigger.STOPPED_BY_SCHEDULER: Policy(Action.REQUEUE),
    Trigger.STOPPED_BY_PERSON: Policy(Action.END),
    Trigger.FINISHED: Policy(Action.END),
    Trigger.CANNOT_CONTINUE: Policy(Action.END),
    # DeepSpeed skips it: see distributed/zero.
    Trigger.GRADIENT_NOT_FINITE: Policy(Action.SKIP_UPDATE, limit="max_skipped_in_a_row", table="divergence"),
}

# Which trigger the exit code of a job run is, when no person has asked for a stop.
TRIGGERS: Mapping[ExitCode, Trigger] = {
    ExitCode.FINISHED: Trigger.FINISHED,
    ExitCode.FAILED: Trigger.JOB_RUN_FAILED,
    ExitCode.BAD_INPUT: Trigger.CANNOT_CONTINUE,
    ExitCode.STOPPED: Trigger.STOPPED_BY_SCHEDULER,
    ExitCode.DO_NOT_RESTART: Trigger.CANNOT_CONTINUE,
}


def action_on(trigger: Trigger, *, count: int = 1, limits: object = None, can_requeue: bool = True) -> Action:
    """The action when `trigger` has happened `count` times in a row.

    `limits` is the table of the run config that the policy names. Where the scheduler cannot requeue, END
    replaces REQUEUE.
    """
    policy = POLICIES[trigger]
    if policy.limit is not None and count >= getattr(limits, policy.limit):
        return policy.beyond
    if policy.action in (Action.REQUEUE, Action.REQUEUE_ELSEWHERE) and not can_requeue:
        return Action.END
    return policy.action
