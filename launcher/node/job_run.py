"""How a turn of a job ended, by what its workers, its nodes and the turns before it wrote down.

A job in Slurm has a turn each time it starts. torchrun's exit code is not to be trusted (it is 1 after a
clean stop): the outcome is what rank 0 wrote in the attempt's result.json; without one, the turn failed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.run import record
from gpt.run.events import Event, read_events, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import retry_on_oserror
from gpt.run.records import JobOutcome, Owner, Result
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.node.rendezvous import Place, failures

_TAIL_LINES = 20


@dataclass(frozen=True)
class Turn:
    """The turn of `place`, with its files in `submission`; attempts up to `after` were made before it."""

    run: RunDir
    place: Place
    submission: SubmissionDir
    after: int

    def failures(self) -> list[str]:
        """What other nodes of this turn say of their failure."""
        try:
            return failures(self.place, self.submission)
        except OSError:  # a shared file system that fails for a moment
            return []

    def is_current(self) -> bool:
        """Whether no other job, and no later turn of this one, has made an attempt since this turn began."""
        return not any(
            (owner := self._owner(number)) is not None and owner != (self.place.job, self.place.turn)
            for number in self.run.attempt_numbers()
            if number > self.after
        )

    def own_attempt(self) -> int | None:
        """The newest attempt of this turn."""
        mine = (self.place.job, self.place.turn)
        numbers = [number for number in self.run.attempt_numbers() if number > self.after]
        return next((number for number in reversed(numbers) if self._owner(number) == mine), None)

    def outcome(self, torchrun_code: int, *, stopped_now: bool, was_signalled: bool) -> JobOutcome:
        """How the turn ended whose workers are gone; written down where they did not do so."""
        attempt = self.own_attempt()
        if attempt is not None:
            result = Result.read(self.run.attempt(attempt).result)
            if result is not None:
                outcome = JobOutcome(exit_code=result.exit_code, cause=result.cause, attempt=attempt)
                return self._with_nodes_given_again(outcome)
        elsewhere = self.failures()
        cause = "; ".join([f"the workers ended without a result (torchrun: {torchrun_code})", *elsewhere])
        if stopped_now:
            outcome = JobOutcome(
                exit_code=ExitCode.FAILED, cause="stopped at once, without saving, as asked", attempt=attempt
            )
        elif was_signalled and self.place.job_id is not None and not elsewhere:
            # Slurm signals torchrun too, which dies of it while it still imports: no fault of the run.
            outcome = JobOutcome(
                exit_code=ExitCode.STOPPED, cause=f"asked to stop, and {cause}", attempt=attempt
            )
        else:
            tail = _tail(self.submission.node_log(self.place.node))
            outcome = JobOutcome(
                exit_code=ExitCode.FAILED, cause=f"{cause}\n{tail}".rstrip(), attempt=attempt
            )
        if attempt is not None:
            result = Result(exit_code=outcome.exit_code, cause=outcome.cause)
            retry_on_oserror(lambda: result.write(self.run.attempt(attempt).result))
        name = Event.FAILED if outcome.exit_code == ExitCode.FAILED else Event.INTERRUPTED
        record_event(self.run.events, name, cause=outcome.cause.splitlines()[0])
        return outcome

    def bad_nodes(self, outcome: JobOutcome) -> list[str]:
        """The nodes that this attempt's check has named."""
        if outcome.attempt is None:
            return []
        return [line["node"] for line in self._all_bad_nodes() if line.get("attempt") == outcome.attempt]

    def failed_turns(self) -> int:
        """Turns of this job that ended in a failure since the last checkpoint, this one included."""
        count = 1
        for line in retry_on_oserror(lambda: list(read_events(self.run.events))):
            match line["event"]:
                case Event.CHECKPOINT_SAVED:
                    count = 1
                case Event.REQUEUED if line.get("failed") and line.get("job") == self.place.job:
                    count += 1
        return count

    def _owner(self, attempt: int) -> tuple[str, int] | None:
        owner = Owner.read(self.run.attempt(attempt).owner)
        return (owner.job, owner.job_run) if owner is not None and owner.job else None

    def _with_nodes_given_again(self, outcome: JobOutcome) -> JobOutcome:
        """A stop for a bad node is a failure where that node had been named before: Slurm was asked to keep
        the job away from it and has not, and would do so for ever.
        """
        named = {line["node"] for line in self._all_bad_nodes() if line.get("attempt") != outcome.attempt}
        again = named.intersection(self.bad_nodes(outcome))
        if outcome.exit_code != ExitCode.STOPPED or not again:
            return outcome
        given = f"Slurm has given the job {', '.join(sorted(again))} again, which it was to keep away from"
        return JobOutcome(
            exit_code=ExitCode.FAILED, cause=f"{outcome.cause}; {given}", attempt=outcome.attempt
        )

    def _all_bad_nodes(self) -> list[dict[str, Any]]:
        return retry_on_oserror(lambda: [line for line in record.read(self.run.bad_nodes) if "node" in line])


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
