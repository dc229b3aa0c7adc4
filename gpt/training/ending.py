"""How an attempt ends: it finishes, or it saves and stops. Every function here is collective."""

import time

from data_pipeline.errors import CheckpointError, Diverged
from data_pipeline.sampling.skip_list import Ranges
from gpt.checkpoint.doubt import doubt_of
from gpt.checkpoint.format import committed
from gpt.distributed.world import from_first, total
from gpt.run.attempts import AttemptRemoved, Superseded
from gpt.run.exit_codes import ExitCode
from gpt.run.failure_policy import Action, Trigger, action_on
from gpt.run.json_file import retry_on_oserror
from gpt.run.records import StopRequest
from gpt.saving.saver import Saver
from gpt.training.attempt import Attempt, AttemptOutcome

_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 600.0


def is_any_rank_asked_to_stop(attempt: Attempt) -> bool:
    """Whether a stop was requested on any rank."""
    (asked,) = total(attempt.world, attempt.stop.is_requested())
    return asked > 0


def ask_to_stop_for_good(attempt: Attempt, reason: str) -> bool:
    """Stop as if a person had asked for it, so that no scheduler starts the run again; True."""
    attempt.stop.reason = attempt.stop.reason or reason
    if attempt.world.is_first:
        retry_on_oserror(lambda: StopRequest(reason=reason, time=time.time()).write(attempt.run_dir.stop))
    return True


def wait_to_be_killed(attempt: Attempt, step: int) -> None:
    """Do nothing for _LONGEST_PAUSE_S, or until a stop is requested."""
    for _ in range(round(_LONGEST_PAUSE_S / _PAUSE_S)):  # counted, so that all ranks go on together
        if is_any_rank_asked_to_stop(attempt):
            return
        attempt.clock.heartbeat.beat(step, "waiting to be killed")
        time.sleep(_PAUSE_S)


def refuse_endless_skips(attempt: Attempt, step: int, in_a_row: int) -> None:
    """Raise Diverged after `step` when too many updates `in_a_row` were left out."""
    limits = attempt.run.divergence
    if action_on(Trigger.GRADIENT_NOT_FINITE, count=in_a_row, limits=limits) is Action.SKIP_UPDATE:
        return
    first, run_dir = step - in_a_row + 1, attempt.run_dir
    damaged = doubt_of(run_dir.events).not_finite
    before = [n for n, _ in committed(run_dir.checkpoints) if n < first and n not in damaged]
    advice = "No checkpoint from before is left: launch a new run, with other data or a lower rate"
    if before:
        advice = (
            f"Go back with `outlast resume {run_dir.path} --step {before[-1]}`, and skip the data of these "
            "steps (data.skip) or lower the rate (optimizer.peak_lr with --allow-change)"
        )
    raise Diverged(
        f"the gradients of {in_a_row} steps in a row, {first} to {step}, were not finite: the run no longer "
        f"learns. {advice}"
    )


def finished(attempt: Attempt) -> AttemptOutcome:
    """The outcome after the last step."""
    last = attempt.run.total_steps
    return AttemptOutcome(ExitCode.FINISHED, f"all {last} steps are done", last)


def stopped(attempt: Attempt, step: int, what: str, exit_code: ExitCode = ExitCode.STOPPED) -> AttemptOutcome:
    """The outcome after a stop at `step`; `what` says what was saved."""
    reason = from_first(attempt.world, attempt.stop.reason) or "a signal to another rank"
    return AttemptOutcome(exit_code, f"stopped at step {step} ({reason}); {what}", step)


def save_and_end(
    attempt: Attempt, saver: Saver, step: int, skipped: Ranges, *, problem: str | None, is_stopping: bool
) -> AttemptOutcome:
    """Save `step` and end the attempt. A stop discards a save that is still being written.

    When the save fails after a stop request, the steps since the last checkpoint are lost, but the run can be
    resumed. Without a stop request the error is raised.
    """
    if is_stopping:
        saver.give_up()
    try:
        saver.save_and_wait(step, skipped, problem=problem)
    except (Superseded, AttemptRemoved):
        raise
    except CheckpointError as error:
        if not is_any_rank_asked_to_stop(attempt):
            raise
        return stopped(attempt, step, f"not saved: {error}", ExitCode.FAILED)
    is_finished = step == attempt.run.total_steps
    return finished(attempt) if is_finished else stopped(attempt, step, "everything is saved")
