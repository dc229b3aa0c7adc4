"""Copies committed checkpoints of a run to its mirror, from a process that training never waits for.

`python -m gpt.sidecars.checkpoint_mirror RUN_DIR`

The newest checkpoint is copied first; older ones follow as time permits. The mirror keeps what the run's own
retention keeps. When the mirror fails, an event records it and the copy is tried again later; training is not
affected. Torch-free.
"""

import sys
import threading
import time
from pathlib import Path

from gpt.checkpoint.doubt import doubt_of
from gpt.checkpoint.format import committed, is_pinned
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.checkpoint.retention import kept
from gpt.checkpoint.writer import Pace
from gpt.config.run import CheckpointConfig, RunConfig
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.records import Sidecar
from gpt.run.run_dir import RunDir
from gpt.sidecars import follower
from gpt.sidecars.health import HealthReport

POLL_S = 2.0
RETRY_S = 30.0
PATIENCE_S = 45.0  # how long a failing mirror is retried once the run has ended


class Copier:
    """Copies the checkpoints of one run to its mirror."""

    def __init__(
        self, run_dir: RunDir, config: CheckpointConfig, ended: threading.Event | None = None
    ) -> None:
        """Copies are limited to max_mb_per_s until `ended` is set.

        Raises MirrorError when the mirror does not answer or belongs to another run.
        """
        assert config.mirror is not None
        self.run_dir, self.config, self._ended = run_dir, config, ended
        self.mirror = Mirror.of(run_dir, config.mirror)
        self.mirror.check_owner(run_dir)
        self._is_there: dict[tuple[int, int], bool] = {}  # step and inode → pinned

    @property
    def newest_step(self) -> int | None:
        """The newest checkpoint of which the mirror holds a copy; None before the first."""
        copied = {step for step, _ in self._is_there}
        return max((step for step, _ in committed(self.run_dir.checkpoints) if step in copied), default=None)

    def copy_next(self) -> bool:
        """Copy the newest checkpoint that the mirror lacks, or update its pin; whether there was one."""
        for step, folder in reversed(committed(self.run_dir.checkpoints)):
            try:
                key, is_pin = (step, folder.stat().st_ino), is_pinned(folder)
                if self._is_there.get(key) == is_pin:
                    continue
                if not self.mirror.has(step, folder):
                    self._copy(step, folder)
                self.mirror.set_pin(step, is_pinned=is_pin)
            except (OSError, MirrorError):
                if folder.exists():
                    raise
                continue  # pruned meanwhile, so no copy is needed
            self._is_there[key] = is_pin
            self._prune()
            return True
        return False

    def _copy(self, step: int, folder: Path) -> None:
        started = time.monotonic()
        self.mirror.put_run(self.run_dir)
        limit = self.config.max_mb_per_s
        count = self.mirror.put(step, folder, Pace(limit, self._ended) if limit is not None else None)
        seconds = round(time.monotonic() - started, 1)
        record_event(self.run_dir.events, Event.MIRRORED, step=step, seconds=seconds, bytes=count)

    def _prune(self) -> None:
        here = [step for step, _ in committed(self.run_dir.checkpoints)]
        if here:  # later ones are from before a rewind, and retention would prefer them to the new ones
            self.mirror.rewind(here[-1])
        steps = self.mirror.steps()
        pinned = [step for step in steps if self.mirror.is_pinned(step)]
        losses = record.val_losses(self.run_dir.metrics) if self.config.keep_best else {}
        doubt = doubt_of(self.run_dir.events)
        for step in set(steps) - kept(steps, self.config, pinned, losses, doubt):
            self.mirror.delete(step)


def follow(run_dir: RunDir, config: CheckpointConfig, ended: threading.Event) -> None:
    """Copy until `ended` is set and all committed checkpoints are copied, or until PATIENCE_S after that."""
    copier: Copier | None = None

    def record_failure(reason: str) -> None:
        record_event(run_dir.events, Event.MIRROR_FAILED, reason=reason)

    def copy_all(_is_last: bool) -> None:
        nonlocal copier
        copier = copier or Copier(run_dir, config, ended)
        while copier.copy_next():
            report.succeeded(copier.newest_step)
        report.succeeded(copier.newest_step)

    report = HealthReport(run_dir, Sidecar.MIRRORING, record_failure)
    follower.follow(copy_all, ended, report, poll_s=POLL_S, retry_s=RETRY_S, patience_s=PATIENCE_S)


if __name__ == "__main__":
    ended = follower.become_sidecar(is_last_pass="--last-pass" in sys.argv[2:])
    run = RunDir(Path(sys.argv[1]))
    follow(run, RunConfig.model_validate_json(run.config.read_text()).checkpoint, ended)
