"""Runs torchrun on one node to its end, and acts on stop requests, hangs and other nodes' failures."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gpt.config.run import RunConfig
from gpt.run.failure_policy import Action
from gpt.run.process_control import dies_with_parent
from gpt.run.stop import STOP_SIGNALS
from launcher.cluster import ClusterConfig
from launcher.node.hangs import HangHandler
from launcher.node.job_run import JobRun
from launcher.node.rendezvous import rendezvous
from launcher.node.sidecars import Sidecars
from launcher.node.torchrun import torchrun_command, worker_environment
from launcher.process_tree import kill_descendants, workers
from launcher.runs.stop_request import pending_stop, request_stop

_POLL_S = 0.1
_CHECK_S = 1.0  # each check reads all processes of the node, and asks the shared file system


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


@dataclass(frozen=True)
class TorchrunEnd:
    """torchrun's exit code, and whether a stop request killed the workers without saving."""

    code: int
    stopped_now: bool


class Supervisor:
    """The workers of one node in one job run. The sidecars outlive the workers."""

    def __init__(
        self,
        job_run: JobRun,
        config: RunConfig,
        cluster: ClusterConfig,
        signals: ReceivedSignals,
        mounts: Sequence[Path],
        sidecars: Sidecars,
    ) -> None:
        self._job_run, self._config, self._cluster = job_run, config, cluster
        self._signals, self._mounts, self._sidecars = signals, mounts, sidecars
        self._hangs = HangHandler(job_run.run, job_run.identity, config.launch)

    def run(self) -> TorchrunEnd:
        """Start torchrun and return when it has ended."""
        torchrun = self._start()
        stopped_now = False
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
            if self._hangs.handle(workers(torchrun.pid)) is Action.END_JOB_RUN:
                torchrun.kill()
            stopped_now = (request := pending_stop(self._job_run.run)) is not None and request.now
            if stopped_now or self._job_run.failures():
                torchrun.kill()
                kill_descendants(spare=self._sidecars.pids())
        return TorchrunEnd(torchrun.wait(), stopped_now)

    def _start(self) -> subprocess.Popen[bytes]:
        identity, submission = self._job_run.identity, self._job_run.submission
        point = rendezvous(identity, self._job_run.scheduler, submission)
        environment = worker_environment(
            self._cluster, identity, self._job_run.after_attempt, self._hangs.heartbeat, os.environ
        )
        logs = submission.torchrun_logs(identity.job_run, identity.node)
        command = torchrun_command(
            self._job_run.run, self._config, self._cluster, identity, point, logs, self._mounts
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
