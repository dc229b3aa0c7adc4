"""The sidecars of a job: processes that send the record to MLflow, and the checkpoints to the mirror.

They follow the run directory, no worker waits for them, and they outlive the workers to send what is left.
"""

import signal
import subprocess
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.process_control import dies_with_parent
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.cluster import ClusterConfig
from launcher.runs.code_snapshot import python_module
from launcher.scheduler.container import inside

_TRACKING_DRAIN_S = 60.0
_MIRRORING_DRAIN_S = 600.0
_HURRIED_DRAIN_S = 5.0  # a grace time may be running, and the next job run sends the rest


class Sidecars:
    """Starts the sidecars that the config asks for, and lets them finish."""

    def __init__(
        self, run: RunDir, submission: SubmissionDir, config: RunConfig, cluster: ClusterConfig
    ) -> None:
        self._run, self._submission, self._config, self._cluster = run, submission, config, cluster
        self._tracking: subprocess.Popen[bytes] | None = None
        self._mirroring: subprocess.Popen[bytes] | None = None

    def start(self, mounts: list[Path]) -> None:
        """Start them; `mounts` are the folders that they must see in a container."""
        if self._config.tracking.enabled:
            log = self._submission.tracking_log
            self._tracking = self._start("gpt.sidecars.mlflow", log, mounts)
        if self._config.checkpoint.mirror is not None:
            log = self._submission.mirroring_log
            self._mirroring = self._start("gpt.sidecars.checkpoint_mirror", log, mounts)

    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in (self._tracking, self._mirroring) if process is not None]

    def drain(self) -> None:
        """Let them send what is left; a failure of theirs never matters."""
        if self._tracking is not None:
            _drain(self._tracking, _TRACKING_DRAIN_S)
        if self._mirroring is not None:
            _drain(self._mirroring, _MIRRORING_DRAIN_S)

    def drain_in_a_hurry(self) -> None:
        """Let the tracker send what it can in a few seconds."""
        if self._tracking is not None:
            _drain(self._tracking, _HURRIED_DRAIN_S)

    def _start(self, module: str, log_path: Path, mounts: list[Path]) -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            return subprocess.Popen(
                inside(python_module(module, str(self._run.path)), self._cluster, mounts),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )


def _drain(sidecar: subprocess.Popen[bytes], timeout_s: float) -> None:
    sidecar.terminate()
    try:
        sidecar.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        sidecar.kill()
