"""The task on each node: torchrun as a child, stop requests, and one truthful word about how it ended.

submitit calls `NodeTask` once a node. How its turn of the job ended, launcher.node.job_run says; in Slurm the
first node decides what follows: a stop that the scheduler asked for (preemption, the time limit) and a
failure that was not the run's own put the job back in the queue, by our own `scontrol requeue`: Slurm
requeues only what it had to kill. Nothing is left behind: the children end with this process, and this
process ends with what started it. It trains nothing, imports no torch, and never goes on after a result
that says not to.
"""

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import LaunchError
from gpt.config.run import RunConfig
from gpt.run.events import Event, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import retry_on_oserror
from gpt.run.process_control import adopt_orphans, die_with_parent, dies_with_parent
from gpt.run.records import JobOutcome
from gpt.run.run_dir import RunDir
from gpt.run.stop import STOP_SIGNALS
from launcher.cluster import ClusterConfig
from launcher.node.hang_watchdog import Watch, culprits, gather, report
from launcher.node.job_run import Turn
from launcher.node.rendezvous import Place, find_place, meet, report_failure
from launcher.node.tmpdir import make_scratch, remove_scratch
from launcher.node.torchrun import torchrun_command, worker_environment
from launcher.process_tree import (
    kill_descendants,
    workers,
)
from launcher.runs.job_record import read_job
from launcher.runs.stop_request import clear_job_run_stop, is_persons, pending_stop, request_stop
from launcher.runs.store import python_module, read_cluster, read_config
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.bad_nodes import without_bad_nodes
from launcher.scheduler.container import inside, needed_folders
from launcher.scheduler.sbatch import requeue_mark

_POLL_S = 0.1
_LOOK_S = 1.0  # each look goes through all processes of the node, and asks the shared file system
_TRACKING_DRAIN_S = 60.0
_MIRRORING_DRAIN_S = 600.0
_HURRIED_DRAIN_S = 5.0  # a grace time may be running, and the next turn sends what is left
_TO_BE_KILLED_S = 120.0


@dataclass
class NodeTask:
    """What submitit pickles: where the run is, and which submission this belongs to. Nothing else."""

    run_dir: str
    submission: str

    def __call__(self) -> dict[str, Any]:
        """Train until the workers end; the outcome as a dict, on every node but the first an empty one."""
        return _Node(RunDir(Path(self.run_dir)), self.submission).work()


class _Node:
    def __init__(self, run: RunDir, submission: str) -> None:
        self.run = run
        self.submission = run.submission(int(submission))
        self.folder = self.submission.path
        self.submitit_folder = Path(
            os.environ.get("SUBMITIT_FOLDER", self.folder)
        )  # an array has one for all
        self.config: RunConfig = retry_on_oserror(lambda: read_config(run))
        self.cluster: ClusterConfig = retry_on_oserror(lambda: read_cluster(run))
        self.place: Place = find_place(self.cluster)
        self.signal_name: str | None = None
        self.was_signalled = False
        self.stopped_now = False
        self.hangs_at_start = 0
        self.tracking: subprocess.Popen[bytes] | None = None
        self.mirroring: subprocess.Popen[bytes] | None = None
        self.scratch: Path | None = None
        after = max(retry_on_oserror(run.attempt_numbers), default=0)
        self.turn = Turn(run, self.place, self.submission, after)

    def work(self) -> dict[str, Any]:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends one before each SIGTERM; submitit logs it
        self.scratch = make_scratch(self.place)
        adopt_orphans()
        die_with_parent(signal.SIGKILL)  # a job whose controller or slurmstepd is gone passes for dead
        retry_on_oserror(self._remove_leftovers_of_submitit)
        if not self.place.is_first:
            return self._help()
        try:
            outcome = self._turn()
        except Exception as error:  # Slurm lets a job that fails fail: it is for us to start it again
            traceback.print_exc()
            kill_descendants(spare=self._spared())
            outcome = JobOutcome(
                exit_code=ExitCode.FAILED, cause=f"the node task failed: {error!r}", attempt=None
            )
            record_event(self.run.events, Event.FAILED, cause=outcome.cause)
            with suppress(OSError):
                report_failure(self.place, self.submission, outcome.cause)
        if outcome is None:
            # Another copy of the run has started since. Not a file of the run is ours to write any more.
            print("another job has taken the run over; this one ends without a word", flush=True)
            self._leave_nothing()
            return {}
        if self.place.job_id is None or self._is_over(outcome):
            return self._conclude(outcome)
        if (
            outcome.exit_code == ExitCode.FAILED
            and (failed := self.turn.failed_turns()) >= self.config.launch.max_failures
        ):
            cause = (
                f"{failed} turns of the job failed without a new checkpoint, the last one so: {outcome.cause}"
            )
            return self._conclude(
                JobOutcome(exit_code=ExitCode.DO_NOT_RESTART, cause=cause, attempt=outcome.attempt)
            )
        if slurm.is_here() and not slurm.is_wanted(self.place.job_id, self.place.turn):
            return self._end_as_slurm_says(outcome, self.place.job_id)
        return self._requeue(outcome, self.place.job_id)

    def _turn(self) -> JobOutcome | None:
        """Train until the workers end: how they did, or None where the run is another job's by now."""
        self.submission.outcome.unlink(missing_ok=True)
        clear_job_run_stop(self.run)
        if (newest := read_job(self.run)) is not None and newest.submission > self.submission.number:
            return JobOutcome(
                exit_code=ExitCode.DO_NOT_RESTART,
                cause=f"submission {newest.submission:04d} took the run over",
                attempt=None,
            )
        record_event(self.run.events, Event.JOB_RUN_STARTED, job=self.place.job, turn=self.place.turn)
        if self.config.tracking.enabled:
            self.tracking = self._start_beside("gpt.sidecars.mlflow", self.submission.tracking_log)
        if self.config.checkpoint.mirror is not None:
            self.mirroring = self._start_beside(
                "gpt.sidecars.checkpoint_mirror", self.submission.mirroring_log
            )
        code = self._train()
        kill_descendants(spare=self._spared())
        if not self.turn.is_current():
            return None
        return self.turn.outcome(code, stopped_now=self.stopped_now, was_signalled=self.was_signalled)

    def _help(self) -> dict[str, Any]:
        """The part of every node but the first: train, and tell the first one of a failure."""
        try:
            code = self._train()
            self._leave_nothing()
            attempt = self.turn.own_attempt()
            has_result = attempt is not None and (self.run.attempt(attempt).result).exists()
            if code != 0 and not has_result and pending_stop(self.run) is None and not self.turn.failures():
                report_failure(
                    self.place, self.submission, f"the workers ended without a result (torchrun: {code})"
                )
        except Exception as error:
            traceback.print_exc()
            self._leave_nothing()
            # Where even this cannot be written, srun ends the other nodes for it (--kill-on-bad-exit).
            report_failure(self.place, self.submission, f"the node task failed: {error!r}")
        return {}

    def _leave_nothing(self) -> None:
        """End every process that this task has started, and remove what they wrote into TMPDIR."""
        kill_descendants()
        remove_scratch(self.scratch)

    def _conclude(self, outcome: JobOutcome) -> dict[str, Any]:
        # Before the tracker is waited for: a node that is killed meanwhile has ended as it ended.
        retry_on_oserror(lambda: outcome.write(self.submission.outcome))
        if self.tracking is not None and not self.stopped_now:
            _drain(self.tracking, _TRACKING_DRAIN_S)
        if self.mirroring is not None and not self.stopped_now:
            _drain(self.mirroring, _MIRRORING_DRAIN_S)
        self._leave_nothing()
        return outcome.model_dump(mode="json")

    def _is_over(self, outcome: JobOutcome) -> bool:
        """Whether the job is to end here, by what the run and the people behind it say."""
        return (
            is_persons(pending_stop(self.run))
            or self.stopped_now
            or outcome.exit_code not in (ExitCode.FAILED, ExitCode.STOPPED)
        )

    def _requeue(self, outcome: JobOutcome, job_id: str) -> dict[str, Any]:
        """Put the job back in the queue; Slurm then ends this process."""
        exclude = self.turn.bad_nodes(outcome)
        self._end_turn(outcome, exclude)
        if not slurm.is_here():  # in a container: the batch script does it, once this task has ended
            away_from = without_bad_nodes(self.run, self.cluster).exclude or ""
            mark = requeue_mark(self.submitit_folder, job_id, self.place.turn)
            retry_on_oserror(lambda: mark.write_text(away_from))
            return {}
        self.signal_name = None
        try:
            is_requeued = slurm.requeue(job_id, self.place.turn, exclude)
        except LaunchError as error:
            return self._conclude(
                JobOutcome(
                    exit_code=outcome.exit_code, cause=f"{outcome.cause}\n{error}", attempt=outcome.attempt
                )
            )
        if is_requeued:
            deadline = time.monotonic() + _TO_BE_KILLED_S
            while self.signal_name is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)  # who ends at its SIGTERM does not hold the nodes for KillWait
            return {}
        return self._end_as_slurm_says(outcome, job_id)

    def _end_as_slurm_says(self, outcome: JobOutcome, job_id: str) -> dict[str, Any]:
        """The job has been taken from us: put back in the queue by somebody, or cancelled."""
        if not slurm.comes_back(job_id, self.place.turn):
            return self._conclude(_cancelled(outcome))
        self._end_turn(outcome, [])
        return {}

    def _end_turn(self, outcome: JobOutcome, exclude: Sequence[str]) -> None:
        """Write down that another turn follows, and leave nothing of this one."""
        record_event(
            self.run.events,
            Event.REQUEUED,
            job=self.place.job,
            turn=self.place.turn,
            cause=outcome.cause.splitlines()[0],
            failed=outcome.exit_code == ExitCode.FAILED,
            exclude=list(exclude),
        )
        if self.tracking is not None:
            _drain(self.tracking, _HURRIED_DRAIN_S)
        self._leave_nothing()
        with suppress(OSError):  # the next turn does it too
            clear_job_run_stop(self.run)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self.was_signalled = True

    def _train(self) -> int:
        """Run torchrun to its end, turning signals into stop requests; its exit code."""
        meeting = meet(self.place, self.submission)
        watch = Watch(self.config.launch.hang_timeout_s, self.config.launch.start_timeout_s)
        environment = worker_environment(
            self.cluster, self.place, self.turn.after, watch.name, dict(os.environ)
        )
        logs = self.submission.torchrun_logs(self.place.turn, self.place.node)
        with self.submission.node_log(self.place.node).open("ab") as log:
            torchrun = subprocess.Popen(
                torchrun_command(
                    self.run, self.config, self.cluster, self.place, meeting, logs, self._mounts()
                ),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        next_look = time.monotonic() + _LOOK_S
        while torchrun.poll() is None:
            time.sleep(_POLL_S)
            if self.signal_name is not None:
                self._pass_on(self.signal_name, torchrun.pid)
                self.signal_name = None
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _LOOK_S
            if watch.silent(alive := workers(torchrun.pid)):
                self._end_hang(watch, alive)
                if self.hangs_at_start == self.config.launch.max_failures:
                    torchrun.kill()  # it would try a hundred times; another turn may get other nodes
            self.stopped_now = (standing := pending_stop(self.run)) is not None and standing.now
            if self.stopped_now or self.turn.failures():
                torchrun.kill()
                kill_descendants(spare=self._spared())
        return torchrun.wait()

    def _pass_on(self, signal_name: str, torchrun: int) -> None:
        """A signal to this task becomes a stop request, for the workers of all nodes and at once for ours.

        Slurm signals the whole tree of processes or the task alone, by its proctrack plugin.
        """
        for worker in workers(torchrun):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
        is_schedulers = self.place.job_id is not None
        try:
            if self.turn.is_current():
                request_stop(self.run, signal_name, requeue=is_schedulers)
        except OSError as error:  # our workers were told, and one that stops stops them all
            print(f"the stop request cannot be written: {error}", flush=True)

    def _end_hang(self, watch: Watch, alive: Sequence[int]) -> None:
        """Find out who holds up the run, write it down, and end our workers: torchrun starts all again."""
        attempt = watch.attempt
        attempt_dir = self.run.attempt(attempt)
        suspects = watch.suspects(self.place.name, self.place.node, attempt_dir)
        silent_nodes: list[int] = []
        if attempt:
            try:
                report(attempt_dir, self.place.node, suspects)
                suspects, silent_nodes = gather(attempt_dir, self.place.nodes)
            except OSError as error:
                print(f"the report on the hang cannot be passed on: {error}", flush=True)
        # While they start, each node speaks for its own: the others' workers may not even be there.
        self.hangs_at_start += not attempt
        if self.place.is_first or not attempt:
            culprit = culprits(suspects, silent_nodes)
            print(f"no sign of life for {watch.silence_s:.0f} s: {culprit}", flush=True)
            record_event(self.run.events, Event.HANG, attempt=attempt or None, culprit=culprit)
        for worker in alive:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        watch.forget()

    def _start_beside(self, module: str, log_path: Path) -> subprocess.Popen[bytes]:
        """A process that follows the run, that no worker waits for, and that outlives them."""
        with log_path.open("ab") as log:
            command = python_module(module, str(self.run.path))
            return subprocess.Popen(
                inside(command, self.cluster, self._mounts()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )

    def _mounts(self) -> list[Path]:
        """The folders that what runs in a container must see."""
        return [*needed_folders(self.run, self.config), *([self.scratch] if self.scratch else [])]

    def _spared(self) -> list[int]:
        return [process.pid for process in (self.tracking, self.mirroring) if process is not None]

    def _remove_leftovers_of_submitit(self) -> None:
        """A killed turn's half-written result would fail this one, and a whole one would pass for ours."""
        if self.place.job_id is not None:
            for left in self.submitit_folder.glob(f"{self.place.job_id}_{self.place.node}_result.*"):
                left.unlink(missing_ok=True)


def _cancelled(outcome: JobOutcome) -> JobOutcome:
    return JobOutcome(
        exit_code=outcome.exit_code,
        cause=f"cancelled in Slurm; {outcome.cause}",
        attempt=outcome.attempt,
        is_cancelled=True,
    )


def _drain(follower: subprocess.Popen[bytes], patience_s: float) -> None:
    """Let it send what is left of the record, or of the checkpoints; its failure never matters."""
    follower.terminate()
    try:
        follower.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        follower.kill()
