"""The sidecars of a job: processes that send the record to MLflow, and the checkpoints to the mirror.

They follow the run directory, no worker waits for them, and they outlive the workers to send what is left.
One that dies is started again, later each time; how each of them fares is in its sidecar-NAME.json.
"""

import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.events import Event, record_event
from gpt.run.process_control import dies_with_parent
from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir, SubmissionDir
from launcher.cluster import ClusterConfig
from launcher.runs.code_snapshot import python_module
from launcher.scheduler.container import inside

_MODULES = {Sidecar.TRACKING: "gpt.sidecars.mlflow", Sidecar.MIRRORING: "gpt.sidecars.checkpoint_mirror"}
_DRAIN_S = {Sidecar.TRACKING: 60.0, Sidecar.MIRRORING: 600.0}
_HURRIED_DRAIN_S = 5.0  # a grace time may be running, and the next job run sends the rest
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0  # before a dead sidecar is started again
_STEADY_S = 600.0  # a sidecar that has lived this long starts again with the first pause


@dataclass
class _Process:
    """One sidecar; without a process it waits for its next start."""

    sidecar: Sidecar
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    next_start: float = field(default=float("inf"))
    restarts: int = 0


class Sidecars:
    """Starts the sidecars that the config asks for, starts dead ones again, and lets them finish."""

    def __init__(
        self, run: RunDir, submission: SubmissionDir, config: RunConfig, cluster: ClusterConfig
    ) -> None:
        self._run, self._submission, self._config, self._cluster = run, submission, config, cluster
        self._all: list[_Process] = []
        self._mounts: Sequence[Path] = ()

    def start(self, mounts: list[Path]) -> None:
        """Start them; `mounts` are the folders that they must see in a container."""
        self._mounts = mounts
        if self._config.tracking.enabled:
            self._all.append(_Process(Sidecar.TRACKING, self._submission.tracking_log))
        if self._config.checkpoint.mirror is not None:
            self._all.append(_Process(Sidecar.MIRRORING, self._submission.mirroring_log))
        for one in self._all:
            self._start(one)

    def pids(self) -> list[int]:
        """Their process ids."""
        return [one.process.pid for one in self._all if one.process is not None]

    def restart_dead(self) -> None:
        """Start the sidecars again that have ended although the job goes on, after a growing pause."""
        now = time.monotonic()
        for one in self._all:
            if one.process is not None and (code := one.process.poll()) is not None:
                one.process = None
                if now - one.started > _STEADY_S:
                    one.pause_s = _FIRST_PAUSE_S
                one.next_start, one.pause_s = now + one.pause_s, min(2 * one.pause_s, _LONGEST_PAUSE_S)
                self._note_death(one, f"its process ended with {_how(code)}")
            elif one.process is None and now >= one.next_start:
                self._start(one)

    def drain(self) -> None:
        """Let them send what is left, with a last pass of one that is dead; a failure never matters."""
        for one in self._all:
            self._drain(one, _DRAIN_S[one.sidecar])

    def drain_in_a_hurry(self) -> None:
        """Let the tracker send what it can in a few seconds."""
        for one in self._all:
            if one.sidecar is Sidecar.TRACKING:
                self._drain(one, _HURRIED_DRAIN_S)

    def _start(self, one: _Process, *arguments: str) -> None:
        module = python_module(_MODULES[one.sidecar], str(self._run.path), *arguments)
        one.started, one.next_start = time.monotonic(), float("inf")
        try:
            with one.log.open("ab") as log:
                one.process = subprocess.Popen(
                    inside(module, self._cluster, self._mounts),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=dies_with_parent(signal.SIGTERM),
                )
        except OSError as error:  # as on a full disk: no reason to end the job
            one.next_start, one.pause_s = one.started + one.pause_s, min(2 * one.pause_s, _LONGEST_PAUSE_S)
            self._note_death(one, f"its process cannot be started: {error}")

    def _drain(self, one: _Process, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if one.process is not None and one.process.poll() is None:
            one.process.terminate()
            if self._has_finished(one, deadline):
                return
        # One that is dead, or was asked to end before it could understand that, has sent nothing.
        self._start(one, "--last-pass")
        if one.process is not None and not self._has_finished(one, deadline):
            self._note(one, Health.INCOMPLETE, f"its process ended with {_how(one.process.returncode)}")

    def _has_finished(self, one: _Process, deadline: float) -> bool:
        """Wait until the process of `one` has ended; False if it ended badly, with time for another one."""
        assert one.process is not None
        try:
            return one.process.wait(timeout=max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
            self._note(one, Health.INCOMPLETE, "it did not finish in time when the job ended")
            return True

    def _note_death(self, one: _Process, reason: str) -> None:
        one.restarts += 1
        name = one.sidecar.value
        record_event(
            self._run.events, Event.SIDECAR_RESTARTED, sidecar=name, reason=reason, restarts=one.restarts
        )
        self._note(one, Health.DEAD, reason)

    def _note(self, one: _Process, health: Health, error: str) -> None:
        """Write what a sidecar that is dead can no longer write itself."""
        path, now = self._run.sidecar_health(one.sidecar), time.time()
        before = SidecarHealth.read_or_none(path) or SidecarHealth(health=health, since=now, time=now)
        changes = {"health": health, "since": now, "time": now, "error": error, "restarts": one.restarts}
        with suppress(OSError):
            before.model_copy(update=changes).write(path)


def _how(code: int) -> str:
    """An exit code as text; a negative one is a signal's number."""
    if code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return str(code)
