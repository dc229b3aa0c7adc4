"""Kills a run on purpose, once, to show that it recovers. `outlast demo` and `outlast rehearse` use it."""

import os
import signal
from collections.abc import Callable

from gpt.run.attempts import owner_of
from gpt.run.events import Event
from gpt.run.records import Worker
from gpt.run.run_dir import RunDir
from launcher.commands.record_follower import Update


class FaultInjector:
    """Kills a run once, after its first checkpoint, and notes the step from which it resumes.

    `kill` kills the run and returns a phrase for the progress display, such as "worker 1 (process 4242)".
    The kill comes `steps_after_save` steps after the checkpoint, so that it destroys work.
    """

    def __init__(self, kill: Callable[[], str], *, steps_after_save: int) -> None:
        self._kill, self._steps_after_save = kill, steps_after_save
        self.step = 0
        self.saved_step: int | None = None
        self.killed_step: int | None = None
        self.resumed_step: int | None = None

    @property
    def is_down(self) -> bool:
        """Whether the run was killed and has not resumed yet."""
        return self.killed_step is not None and self.resumed_step is None

    def observe(self, update: Update, note: Callable[[str], None]) -> None:
        """Read what is new in the record, and kill the run when the time has come."""
        for event in update.events:
            if event["event"] == Event.CHECKPOINT_SAVED and self.saved_step is None:
                self.saved_step = int(event["step"])
            if event["event"] == Event.RESUMED and self.is_down:
                self.resumed_step = int(event["step"])
        if update.metrics:
            self.step = int(update.metrics[-1]["step"])
        is_due = self.saved_step is not None and self.step >= self.saved_step + self._steps_after_save
        if is_due and self.killed_step is None:
            self.killed_step = self.step
            killed = self._kill()
            note(
                f">>> killed {killed} after step {self.step}; the last checkpoint is that of step "
                f"{self.saved_step}"
            )


def kill_worker(run: RunDir) -> str:
    """Kill the worker with the highest rank in the newest attempt of a local run, and describe it."""
    worker = _last_worker(run)
    os.kill(worker.pid, signal.SIGKILL)
    return f"worker {worker.rank} (process {worker.pid}) with SIGKILL"


def _last_worker(run: RunDir) -> Worker:
    owner = owner_of(run, run.attempt_numbers()[-1])
    assert owner is not None, "a step was recorded, so its attempt has an owner"
    return max(owner.workers, key=lambda worker: worker.rank)
