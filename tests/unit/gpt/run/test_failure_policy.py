"""The table of policies is complete, bounded by the run config, and never requeues where it cannot."""

import pytest

from gpt.config.run import DivergenceConfig, LaunchConfig
from gpt.run.exit_codes import ExitCode
from gpt.run.failure_policy import POLICIES, TRIGGERS, Action, Trigger, action_on

LIMITS = {"launch": LaunchConfig(max_failures=3), "divergence": DivergenceConfig(max_skipped_in_a_row=3)}


def test_every_trigger_and_every_exit_code_has_a_policy() -> None:
    assert POLICIES.keys() == set(Trigger)
    assert TRIGGERS.keys() == set(ExitCode)


def test_limits_are_fields_of_the_tables_that_the_policies_name() -> None:
    limited = [policy for policy in POLICIES.values() if policy.limit is not None]
    assert [p for p in limited if p.limit not in type(LIMITS[p.table]).model_fields] == []
    assert {policy.table for policy in limited} == LIMITS.keys()


@pytest.mark.parametrize(
    ("trigger", "below", "at_the_limit"),
    [
        (Trigger.ATTEMPT_FAILED, Action.RESTART_WORKERS, Action.END),
        (Trigger.HUNG_AT_START, Action.RESTART_WORKERS, Action.END_JOB_RUN),
        (Trigger.JOB_RUN_FAILED, Action.REQUEUE, Action.END),
        (Trigger.GRADIENT_NOT_FINITE, Action.SKIP_UPDATE, Action.END),
    ],
)
def test_action_changes_at_the_limit(trigger: Trigger, below: Action, at_the_limit: Action) -> None:
    limits = LIMITS[POLICIES[trigger].table]
    assert action_on(trigger, count=2, limits=limits) is below
    assert action_on(trigger, count=3, limits=limits) is at_the_limit


@pytest.mark.parametrize("trigger", [Trigger.NODE_FAILED_CHECK, Trigger.STOPPED_BY_SCHEDULER])
def test_job_ends_when_the_scheduler_cannot_requeue(trigger: Trigger) -> None:
    assert action_on(trigger) in (Action.REQUEUE, Action.REQUEUE_ELSEWHERE)
    assert action_on(trigger, can_requeue=False) is Action.END
