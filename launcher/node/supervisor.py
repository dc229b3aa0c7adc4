"""Runs torchrun on one node to its end, and acts on stop requests, hangs and other nodes' failures."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from gpt.config.run import RunConfig
from gpt.run.failure_policy import Action, Trigger, action_on
from gpt.run.json_file import is_listed
from gpt.run.process_control import dies_with_parent
from gpt.run.stop import STOP_SIGNALS
from launcher.cluster import ClusterConfig
from launcher.node.crash_loop import CrashLoop
from launcher.node.hangs import HangHandler
from launcher.node.job_run import JobRun
from launcher.node.rendezvous import rendezvous
from launcher.node.sidecars import Sidecars
from launcher.node.torchrun import GivenUp, TorchrunEnd, torchrun_command, worker_environment
from launcher.process_tree import kill_descendants, workers
from launcher.runs.stop_request import pending_stop, request_stop

_POLL_S = 0.1
_CHECK_S = 1.0  # each check reads all processes of the node, and asks the shared file system
_GONE_CHECKS = 5  # a shared file system may hide a name for a moment
_RESUME_ELSEWHERE = "if the directory is elsewhere, `outlast resume` continues the run there"


class ReceivedSignals:
    """The stop signals that this process has received."""

    def __init__(self) -> None:
        self.newest: str | None = None  # until someone has dealt with it
        self.has_any = False

    def install(self) -> None:
        """Catch the stop signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before SIGTERM, and submitit logs it

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.newest = signal.Signals(number).name
        self.has_any = True


class Supervisor:
    """The workers of one node in one job run. The sidecars outlive the workers.

    `tmpdir` is the job's temporary folder on this node, if there is room for one.
    """

    def __init__(
        self,
        job_run: JobRun,
        config: RunConfig,
        cluster: ClusterConfig,
        signals: ReceivedSignals,
        mounts: Sequence[Path],
        sidecars: Sidecars,
        tmpdir: Path | None,
    ) -> None:
        self._job_run, self._config, self._cluster = job_run, config, cluster
        self._signals, self._mounts, self._sidecars = signals, mounts, sidecars
        self._hangs = HangHandler(job_run.run, job_run.identity, config.launch)
        self._gone_for = 0
        identity, submission = job_run.identity, job_run.submission
        # Not in the run directory, if possible: torchrun would make that anew after it has been moved away.
        logs = submission.torchrun_logs(identity.job_run, identity.node)
        self._logs = tmpdir / "torchrun" if tmpdir is not None else logs
        self._crashes = CrashLoop(job_run, self._logs, submission.node_log(identity.node))

    def run(self) -> TorchrunEnd:
        """Start torchrun and return when it has ended."""
        torchrun = self._start()
        stopped_now, given_up = False, None
        next_check = time.monotonic() + _CHECK_S
        while torchrun.poll() is None:
            time.sleep(_POLL_S)
            if self._signals.newest is not None:
                self._forward(self._signals.newest, torchrun.pid)
                self._signals.newest = None
            if time.monotonic() < next_check:
                continue
            next_check = time.monotonic() + _CHECK_S
            self._sidecars.restart_dead()
            request = pending_stop(self._job_run.run)
            stopped_now = request is not None and request.now
            given_up = given_up or self._reason_to_give_up(torchrun.pid, is_stopping=request is not None)
            if stopped_now or given_up is not None or self._job_run.failures():
                torchrun.kill()
                kill_descendants(spare=self._sidecars.pids())
        if given_up is None and self._is_run_gone():
            given_up = self._given_up_gone()
        return TorchrunEnd(torchrun.wait(), stopped_now, given_up, self._crashes.newest_error())

    def _is_run_gone(self) -> bool:
        """Whether the run directory is no longer there, or the folder of the workers' attempt."""
        run, attempt = self._job_run.run, self._hangs.newest_attempt
        try:
            return not is_listed(run.config) or (attempt > 0 and attempt not in run.attempt_numbers())
        except OSError:  # a shared file system that fails for a moment
            return False

    def _given_up_gone(self) -> GivenUp:
        run, attempt = self._job_run.run, self._hangs.newest_attempt
        what = run.attempt(attempt).path if is_listed(run.config) else run.path
        return GivenUp(Trigger.RUN_DIR_GONE, f"{what} is gone: {Trigger.RUN_DIR_GONE}; {_RESUME_ELSEWHERE}")

    def _reason_to_give_up(self, torchrun: int, *, is_stopping: bool) -> GivenUp | None:
        """Act on workers that hang, or that crash before they make an attempt; why torchrun is to end."""
        self._gone_for = self._gone_for + 1 if self._is_run_gone() else 0
        if self._gone_for > _GONE_CHECKS:  # or torchrun would make it anew, for its logs
            return self._given_up_gone()
        trigger = self._hangs.handle(torchrun, workers(torchrun), is_stopping=is_stopping)
        if trigger is not None and self._hangs.action_on(trigger) is Action.END_JOB_RUN:
            return GivenUp(trigger, f"{trigger}: {self._hangs.culprit}")
        if (crashes := self._crashes.count()) == 0:
            return None
        trigger = Trigger.STARTED_IN_VAIN if is_stopping else Trigger.CRASHED_AT_START
        if action_on(trigger, count=crashes, limits=self._config.launch) is Action.RESTART_WORKERS:
            return None
        times = "once" if crashes == 1 else f"{crashes} times in a row"
        return GivenUp(trigger, f"the workers crashed {times} before an attempt began: {self._crashes.cause}")

    def _start(self) -> subprocess.Popen[bytes]:
        identity, submission = self._job_run.identity, self._job_run.submission
        point = rendezvous(identity, self._job_run.scheduler, submission)
        environment = worker_environment(
            self._cluster, identity, self._job_run.after_attempt, self._hangs.heartbeat, os.environ
        )
        command = torchrun_command(
            self._job_run.run, self._config, self._cluster, identity, point, self._logs, self._mounts
        )
        with submission.node_log(identity.node).open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )

    def _forward(self, signal_name: str, torchrun: int) -> None:
        """Turn a signal into a stop request: at once for our workers, through a file for all nodes.

        Slurm signals the whole process tree or only the task, depending on its proctrack plugin.
        """
        for worker in workers(torchrun):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
        try:
            if self._job_run.is_current():
                requeue = self._job_run.scheduler.can_requeue
                request_stop(self._job_run.run, signal_name, requeue=requeue)
        except OSError as error:  # our workers have the signal, and one that stops makes all ranks stop
            print(f"the stop request cannot be written: {error}", flush=True)
