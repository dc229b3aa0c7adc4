"""How a job run ended, from what its workers, its nodes and earlier job runs have written.

A job has a job run each time the scheduler starts it. torchrun's exit code cannot be trusted (it is 1 after a
clean stop), so the outcome is what rank 0 wrote into the attempt's result.json. Without one, the job run
failed.
"""

from dataclasses import dataclass
from pathlib import Path

from gpt.run.bad_nodes import read_bad_nodes
from gpt.run.events import Event, read_events, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.failure_policy import POLICIES, Trigger
from gpt.run.json_file import retry_on_oserror
from gpt.run.records import BadNode, JobOutcome, Owner, Result
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.node.rendezvous import reported_failures
from launcher.node.torchrun import TorchrunEnd
from launcher.scheduler.protocol import NodeIdentity, Scheduler

_TAIL_LINES = 20


@dataclass(frozen=True)
class JobRun:
    """The job run of the node `identity`. Attempts up to `after_attempt` are older than it."""

    run: RunDir
    submission: SubmissionDir
    identity: NodeIdentity
    scheduler: Scheduler
    after_attempt: int

    def failures(self) -> list[str]:
        """The failures that other nodes of this job run have reported."""
        try:
            return reported_failures(self.identity, self.submission)
        except OSError:  # a shared file system that fails for a moment
            return []

    def is_current(self) -> bool:
        """Whether no other job, and no later job run of this one, has started an attempt since."""
        return not any(
            (owner := self._owner(number)) is not None and owner != self._own_name
            for number in self.run.attempt_numbers()
            if number > self.after_attempt
        )

    def own_attempt(self) -> int | None:
        """The newest attempt of this job run."""
        numbers = [number for number in self.run.attempt_numbers() if number > self.after_attempt]
        return next((number for number in reversed(numbers) if self._owner(number) == self._own_name), None)

    def outcome(self, end: TorchrunEnd, *, was_signalled: bool) -> JobOutcome:
        """How the job run ended, now that its workers are gone; recorded if they did not do so themselves."""
        if end.given_up is not None and end.given_up.trigger is Trigger.RUN_DIR_GONE:
            return JobOutcome(exit_code=ExitCode.DO_NOT_RESTART, cause=end.cause, attempt=None)
        attempt = self.own_attempt()
        if attempt is not None:
            result = Result.read_unless_garbled(self.run.attempt(attempt).result)
            if result is not None:
                outcome = JobOutcome(exit_code=result.exit_code, cause=result.cause, attempt=attempt)
                return self._failed_if_bad_node_returned(outcome)
        exit_code, cause = self._without_result(end, was_signalled)
        if attempt is not None:
            result = Result(exit_code=exit_code, cause=cause)
            retry_on_oserror(lambda: result.write(self.run.attempt(attempt).result))
        event = Event.FAILED if exit_code == ExitCode.FAILED else Event.INTERRUPTED
        requested = {"requested": True} if end.stopped_now else {}
        record_event(self.run.events, event, cause=cause.splitlines()[0], **requested)
        return JobOutcome(exit_code=exit_code, cause=cause, attempt=attempt)

    def bad_nodes(self, outcome: JobOutcome) -> list[str]:
        """The nodes that failed the check of this outcome's attempt."""
        if outcome.attempt is None:
            return []
        return [bad.node for bad in self._all_bad_nodes() if bad.attempt == outcome.attempt]

    def failed_in_a_row(self) -> int:
        """How many job runs of this job have failed since the last checkpoint, including this one."""
        count = 1
        for line in retry_on_oserror(lambda: list(read_events(self.run.events))):
            match line["event"]:
                case Event.CHECKPOINT_SAVED:
                    count = 1
                case Event.REQUEUED if line.get("failed") and line.get("job") == self.identity.job:
                    count += 1
        return count

    def _without_result(self, end: TorchrunEnd, was_signalled: bool) -> tuple[ExitCode, str]:
        """The exit code and the cause of a job run that left no result."""
        elsewhere = self.failures()
        output = self.submission.node_log(self.identity.node)
        where = f" (the output is in {output.parent.name}/{output.name})" if end.given_up is not None else ""
        cause = "; ".join([end.cause + where, *elsewhere])
        if end.stopped_now:
            return ExitCode.FAILED, "stopped at once without saving, as requested"
        if was_signalled and self.scheduler.can_requeue and not elsewhere:
            # The scheduler signals torchrun too, which dies of it while it still imports: not a failure.
            return ExitCode.STOPPED, f"the scheduler asked the job to stop, and {cause}"
        if end.given_up is not None:
            is_final = POLICIES[end.given_up.trigger].limit is not None and not self.scheduler.can_requeue
            return ExitCode.DO_NOT_RESTART if is_final else ExitCode.FAILED, cause
        return ExitCode.FAILED, f"{cause}\n{_tail(output)}".rstrip()

    @property
    def _own_name(self) -> tuple[str, int]:
        return self.identity.job, self.identity.job_run

    def _owner(self, attempt: int) -> tuple[str, int] | None:
        owner = Owner.read_unless_garbled(self.run.attempt(attempt).owner)
        return (owner.job, owner.job_run) if owner is not None and owner.job else None

    def _failed_if_bad_node_returned(self, outcome: JobOutcome) -> JobOutcome:
        """A stop because of a bad node is a failure if that node was already known to be bad.

        The scheduler was asked to exclude it and has not, and would give it to the job again and again.
        """
        known = {bad.node for bad in self._all_bad_nodes() if bad.attempt != outcome.attempt}
        again = known.intersection(self.bad_nodes(outcome))
        if outcome.exit_code != ExitCode.STOPPED or not again:
            return outcome
        nodes = ", ".join(sorted(again))
        cause = (
            f"{outcome.cause}; {self.scheduler.title} has given the job {nodes} again despite the exclusion"
        )
        return JobOutcome(exit_code=ExitCode.FAILED, cause=cause, attempt=outcome.attempt)

    def _all_bad_nodes(self) -> list[BadNode]:
        return retry_on_oserror(lambda: list(read_bad_nodes(self.run)))


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
