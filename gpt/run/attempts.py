"""Attempts on disk: who made which, how they ended, and whether a newer one has superseded this one.

An attempt is one generation of workers. Its number is claimed by mkdir, which only one process can win; the
number therefore also fences older copies of the run.
"""

import time
from pathlib import Path

from data_pipeline.errors import CheckpointError
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Owner, Result
from gpt.run.run_dir import RunDir

_HIDDEN_S = 3.0


class Superseded(CheckpointError):
    """A newer attempt has taken the run over: this one must not write anything more."""

    def __init__(self, newer: int, job: str | None = None) -> None:
        owner = f" of {job}" if job is not None else ""
        super().__init__(f"Attempt {newer}{owner} has taken the run over; this attempt ends without writing.")


class AttemptRemoved(CheckpointError):
    """The folder of this attempt is gone: nothing of the run may be made anew at its old place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"{folder} is gone: the run directory was moved or deleted while the run was going. The run ends "
            "without writing. If the directory is elsewhere, `outlast resume` continues it there from its "
            "newest checkpoint."
        )

    def __reduce__(self) -> tuple[type["AttemptRemoved"], tuple[Path]]:
        return AttemptRemoved, (self.folder,)  # the ranks send it to each other


def is_superseded(run_dir: RunDir, attempt: int) -> bool:
    """Whether a newer attempt than `attempt` has started."""
    return max(run_dir.attempt_numbers(), default=attempt) > attempt


def must_end(run_dir: RunDir, attempt: int) -> bool:
    """Whether a newer attempt than `attempt` has started, or its own folder is gone."""
    numbers = run_dir.attempt_numbers()
    return attempt not in numbers or numbers[-1] > attempt


def refuse_if_superseded(run_dir: RunDir, attempt: int) -> None:
    """Raise Superseded when a newer attempt than `attempt` has started, AttemptRemoved when it is gone.

    A folder that a shared file system only hides for a moment is waited for.
    """
    deadline = time.monotonic() + _HIDDEN_S
    while attempt not in (numbers := run_dir.attempt_numbers()):
        if time.monotonic() > deadline:
            raise AttemptRemoved(run_dir.attempt(attempt).path)
        time.sleep(_HIDDEN_S / 10)
    if numbers[-1] > attempt:
        raise Superseded(numbers[-1])


def claim_number(run_dir: RunDir) -> int:
    """Make the folder of the next attempt; its number is the caller's alone."""
    run_dir.attempts.mkdir(exist_ok=True)
    while True:
        number = max(run_dir.attempt_numbers(), default=0) + 1
        try:
            run_dir.attempt(number).path.mkdir()
        except FileExistsError:
            continue
        return number


def owner_of(run_dir: RunDir, attempt: int) -> Owner | None:
    """Which job run made `attempt`; None while that is not written yet, or when it cannot be read."""
    return Owner.read_or_none(run_dir.attempt(attempt).owner)


def result_of(run_dir: RunDir, attempt: int) -> Result | None:
    """How `attempt` ended; None while it runs, and when nothing was written about its end."""
    return Result.read_or_none(run_dir.attempt(attempt).result)


def failures_in_a_row(run_dir: RunDir, attempt: int) -> int:
    """How many attempts of this job, directly before `attempt`, failed without a newer checkpoint.

    An attempt without a result in an earlier job run was ended from outside (preempted, or its node lost),
    which says nothing about the run: it is not counted.
    """
    owner = owner_of(run_dir, attempt)
    count = 0
    for number in reversed([n for n in run_dir.attempt_numbers() if n < attempt]):
        earlier, result = owner_of(run_dir, number), result_of(run_dir, number)
        if result is not None and result.exit_code != ExitCode.FAILED:
            break
        if earlier is not None and _progress(earlier) != _progress(owner):
            break
        if result is not None or earlier is None or earlier.job_run == (owner.job_run if owner else None):
            count += 1
    return count


def _progress(owner: Owner | None) -> tuple[str | None, int | None]:
    return (owner.job, owner.checkpoint_step) if owner is not None else (None, None)
