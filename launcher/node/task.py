"""The task on each node of a job: it runs torchrun, and reports truthfully how that ended.

submitit calls `NodeTask` once per node. launcher.node.job_run finds out how the job run ended, and the first
node decides what follows from gpt/run/failure_policy.py. A stop by the scheduler (preemption, the time
limit) and a failure put the job back in the queue, by a requeue of ours: Slurm requeues only the jobs that
it had to kill. Nothing outlives the task: its children end with it, and it ends with the process that
started it. It trains nothing and imports no torch.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import LaunchError
from gpt.run.events import Event, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.failure_policy import TRIGGERS, Action, Trigger, action_on
from gpt.run.json_file import is_listed, retry_on_oserror
from gpt.run.process_control import adopt_orphans, die_with_parent
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from launcher.node.job_run import JobRun
from launcher.node.rendezvous import report_failure
from launcher.node.sidecars import Sidecars
from launcher.node.supervisor import ReceivedSignals, Supervisor
from launcher.node.tmpdir import make_tmpdir, remove_tmpdir
from launcher.node.torchrun import TorchrunEnd
from launcher.process_tree import kill_descendants
from launcher.runs.job_record import read_job
from launcher.runs.stop_request import clear_job_run_stop, is_persons, pending_stop
from launcher.runs.store import read_cluster, read_config
from launcher.scheduler.bad_nodes import bad_nodes
from launcher.scheduler.container import needed_folders
from launcher.scheduler.protocol import Requeue
from launcher.scheduler.registry import scheduler_of

_POLL_S = 0.1
_REQUEUE_KILL_S = 120.0


@dataclass
class NodeTask:
    """What submitit pickles: only the run, and the submission to which the task belongs."""

    run_dir: str
    submission: str

    def __call__(self) -> dict[str, Any]:
        """Train until the workers end. The outcome as a dict; an empty one on all nodes but the first."""
        run = RunDir(Path(self.run_dir))
        outcome = NodeRunner(run, int(self.submission)).work()
        if not is_listed(run.config):  # submitit would make the run directory anew, for its result
            sys.stdout.flush()
            os._exit(ExitCode.DO_NOT_RESTART)
        return outcome


class NodeRunner:
    """One node of one job run."""

    def __init__(self, run: RunDir, submission: int) -> None:
        self.run, self.submission = run, run.submission(submission)
        self.config = retry_on_oserror(lambda: read_config(run))
        self.cluster = retry_on_oserror(lambda: read_cluster(run))
        self.scheduler = scheduler_of(self.cluster.kind)
        self.identity = self.scheduler.node_identity()
        after_attempt = max(retry_on_oserror(run.attempt_numbers), default=0)
        self.job_run = JobRun(run, self.submission, self.identity, self.scheduler, after_attempt)
        self.signals = ReceivedSignals()
        self.sidecars = Sidecars(run, self.submission, self.config, self.cluster)
        self.tmpdir: Path | None = None
        self.stopped_now = False
        # The runs of an array share one folder for submitit's files.
        self.submitit_folder = Path(os.environ.get("SUBMITIT_FOLDER", self.submission.path))

    def work(self) -> dict[str, Any]:
        """Train, and on the first node decide what follows; the outcome as a dict."""
        self.signals.install()
        # A job whose controller or slurmstepd is gone counts as dead, also if that happened before this line.
        die_with_parent(signal.SIGKILL, self.scheduler.parent_of_task())
        self.tmpdir = make_tmpdir(self.identity)
        adopt_orphans()
        retry_on_oserror(self._remove_old_results)
        if not self.identity.is_first:
            return self._run_other_node()
        try:
            outcome = self._run_first_node()
        except Exception as error:  # Slurm would end a job that fails; starting it again is up to us
            traceback.print_exc()
            kill_descendants(spare=self.sidecars.pids())
            cause = f"the node task failed: {error!r}"
            outcome = JobOutcome(exit_code=ExitCode.FAILED, cause=cause, attempt=None)
            record_event(self.run.events, Event.FAILED, cause=outcome.cause)
            with suppress(OSError):
                report_failure(self.identity, self.submission, outcome.cause)
        if outcome is None:
            print("another job has taken the run over; this job ends without writing", flush=True)
            self._clean_up()
            return {}
        return self._decide(outcome)

    def _run_first_node(self) -> JobOutcome | None:
        """Train until the workers end; how they ended, or None if another job has taken the run over."""
        self.submission.outcome.unlink(missing_ok=True)
        clear_job_run_stop(self.run)
        if (newest := read_job(self.run)) is not None and newest.submission > self.submission.number:
            return JobOutcome(
                exit_code=ExitCode.DO_NOT_RESTART,
                cause=f"submission {newest.submission:04d} took the run over",
                attempt=None,
            )
        record_event(
            self.run.events, Event.JOB_RUN_STARTED, job=self.identity.job, turn=self.identity.job_run
        )
        self.sidecars.start(self._mounts())
        end = self._train()
        self.stopped_now = end.stopped_now
        kill_descendants(spare=self.sidecars.pids())
        if not self.job_run.is_current():
            return None
        return self.job_run.outcome(end, was_signalled=self.signals.has_any)

    def _run_other_node(self) -> dict[str, Any]:
        """Train on any node but the first, and tell the first one about a failure."""
        try:
            end = self._train()
            self._clean_up()
            attempt = self.job_run.own_attempt()
            has_result = attempt is not None and self.run.attempt(attempt).result.exists()
            is_stopping = pending_stop(self.run) is not None
            # The other nodes wait for workers that this one does not start again, also while they stop.
            is_failure = end.given_up is not None or (end.code != 0 and not is_stopping)
            if is_failure and not has_result and not self.job_run.failures():
                report_failure(self.identity, self.submission, end.cause)
        except Exception as error:
            traceback.print_exc()
            self._clean_up()
            # If even this cannot be written, srun ends the other nodes for it (--kill-on-bad-exit).
            report_failure(self.identity, self.submission, f"the node task failed: {error!r}")
        return {}

    def _train(self) -> TorchrunEnd:
        supervisor = Supervisor(
            self.job_run, self.config, self.cluster, self.signals, self._mounts(), self.sidecars, self.tmpdir
        )
        return supervisor.run()

    def _decide(self, outcome: JobOutcome) -> dict[str, Any]:
        """End the job, or put it back in the queue, as the failure policy says."""
        can_requeue = self.scheduler.can_requeue
        trigger, count = self._trigger(outcome), 1
        if trigger is Trigger.JOB_RUN_FAILED and can_requeue:
            count = self.job_run.failed_in_a_row()
        action = action_on(trigger, count=count, limits=self.config.launch, can_requeue=can_requeue)
        if action is Action.END:
            if trigger is Trigger.JOB_RUN_FAILED and can_requeue:
                outcome = _given_up(outcome, count)
            return self._conclude(outcome)
        if not self.scheduler.owns_nodes(self.identity):
            return self._end_without_nodes(outcome)
        return self._requeue(outcome)

    def _trigger(self, outcome: JobOutcome) -> Trigger:
        if self.stopped_now or is_persons(pending_stop(self.run)):
            return Trigger.STOPPED_BY_PERSON
        trigger = TRIGGERS[outcome.exit_code]
        if trigger is Trigger.STOPPED_BY_SCHEDULER and self.job_run.bad_nodes(outcome):
            return Trigger.NODE_FAILED_CHECK
        return trigger

    def _requeue(self, outcome: JobOutcome) -> dict[str, Any]:
        """Put the job back in the queue; the scheduler then ends this process."""
        found = self.job_run.bad_nodes(outcome)
        self._end_job_run(outcome, found)
        excluded = [*filter(None, [self.cluster.exclude]), *bad_nodes(self.run)]
        self.signals.newest = None
        try:
            answer = self.scheduler.requeue(self.identity, found, excluded, self.submitit_folder)
        except LaunchError as error:
            cause = f"{outcome.cause}\n{error}"
            return self._conclude(
                JobOutcome(exit_code=outcome.exit_code, cause=cause, attempt=outcome.attempt)
            )
        if answer is Requeue.NOT_RUNNING:
            return self._end_without_nodes(outcome)
        deadline = time.monotonic() + (_REQUEUE_KILL_S if answer is Requeue.ACCEPTED else 0.0)
        while self.signals.newest is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # a process that ends at its SIGTERM does not hold the nodes for KillWait
        return {}

    def _end_without_nodes(self, outcome: JobOutcome) -> dict[str, Any]:
        """End a job run that has lost its nodes: someone has requeued or cancelled the job."""
        if self.scheduler.was_requeued(self.identity):
            self._end_job_run(outcome, [])
            return {}
        cause = f"cancelled in {self.scheduler.title}; {outcome.cause}"
        return self._conclude(
            JobOutcome(exit_code=outcome.exit_code, cause=cause, attempt=outcome.attempt, is_cancelled=True)
        )

    def _conclude(self, outcome: JobOutcome) -> dict[str, Any]:
        """Record that the job has ended, and let the sidecars send what is left."""
        # First of all: if the node is killed while it waits for the sidecars, the outcome still counts.
        if not is_listed(self.run.config):  # nothing is made anew where the run directory was
            print(outcome.cause, flush=True)
            self._clean_up()
            return outcome.model_dump(mode="json")
        retry_on_oserror(lambda: outcome.write(self.submission.outcome))
        if self.stopped_now:
            self.sidecars.drain_in_a_hurry()
        else:
            self.sidecars.drain()
        self._clean_up()
        return outcome.model_dump(mode="json")

    def _end_job_run(self, outcome: JobOutcome, exclude: list[str]) -> None:
        """Record that another job run follows, and leave nothing of this one."""
        record_event(
            self.run.events,
            Event.REQUEUED,
            job=self.identity.job,
            turn=self.identity.job_run,
            cause=outcome.cause.splitlines()[0],
            failed=outcome.exit_code == ExitCode.FAILED,
            exclude=exclude,
        )
        self.sidecars.drain_in_a_hurry()
        self._clean_up()
        with suppress(OSError):  # the next job run does it too
            clear_job_run_stop(self.run)

    def _clean_up(self) -> None:
        """End every process that this task has started, and remove its temporary folder."""
        kill_descendants()
        remove_tmpdir(self.tmpdir)

    def _mounts(self) -> list[Path]:
        """The folders that a container must see."""
        return [*needed_folders(self.run, self.config), *([self.tmpdir] if self.tmpdir else [])]

    def _remove_old_results(self) -> None:
        """Remove submitit's result of an earlier job run.

        A half-written one would make this job run fail, and a whole one would pass for its result.
        """
        for left in self.submitit_folder.glob(f"{self.identity.job_id}_{self.identity.node}_result.*"):
            left.unlink(missing_ok=True)


def _given_up(outcome: JobOutcome, count: int) -> JobOutcome:
    """The outcome of a job whose job runs have failed too often."""
    cause = f"{count} job runs failed without a new checkpoint; the last one: {outcome.cause}"
    return JobOutcome(exit_code=ExitCode.DO_NOT_RESTART, cause=cause, attempt=outcome.attempt)
