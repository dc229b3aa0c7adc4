"""What rank 0 does once every rank has written its file: commit, record the event, prune."""

import time

from gpt.checkpoint.doubt import doubt_of
from gpt.checkpoint.failpoints import reach
from gpt.checkpoint.format import CheckpointIndex, committed, is_pinned
from gpt.checkpoint.removal import prune
from gpt.checkpoint.retention import kept
from gpt.checkpoint.writer import commit
from gpt.config.run import CheckpointConfig
from gpt.run import record
from gpt.run.attempts import refuse_if_superseded
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from gpt.saving.rank_writer import RankWriter
from gpt.saving.save_in_flight import SaveInFlight
from gpt.saving.save_interval import SaveClock


class Committer:
    """The commits of one attempt; they run in the background thread of rank 0."""

    def __init__(self, run_dir: RunDir, config: CheckpointConfig, attempt: int, clock: SaveClock) -> None:
        self._run_dir, self._config, self._attempt, self._clock = run_dir, config, attempt, clock

    def commit(self, save: SaveInFlight, index: CheckpointIndex, writer: RankWriter) -> None:
        """Commit `save` with its complete `index`. Raises Superseded when a newer attempt has started."""
        run_dir = self._run_dir
        reach("gathered")
        record.sync(run_dir.metrics)
        reach("record_synced")
        self._refuse_if_superseded()
        commit(run_dir.checkpoints, save.folder, index)
        seconds = time.monotonic() - save.started
        stall_s = writer.stall_s(save, seconds)
        self._clock.saved(stall_s, seconds)
        record_event(
            run_dir.events,
            Event.CHECKPOINT_SAVED,
            step=index.step,
            seconds=round(seconds, 3),
            stall_s=round(stall_s, 4),
            bytes=sum(file.size for file in index.files),
            verified=True,
        )
        if save.ranks_not_finite:
            record_event(
                run_dir.events,
                Event.CHECKPOINT_NOT_FINITE,
                step=index.step,
                ranks=save.ranks_not_finite,
                reason="the weights hold NaN or infinity",
            )
        try:
            self._prune()
        except OSError as error:
            record_event(run_dir.events, Event.PRUNE_FAILED, reason=str(error))

    def _refuse_if_superseded(self) -> None:
        refuse_if_superseded(self._run_dir, self._attempt)

    def _prune(self) -> None:
        found = dict(committed(self._run_dir.checkpoints))
        pinned = [step for step, folder in found.items() if is_pinned(folder)]
        losses = record.val_losses(self._run_dir.metrics) if self._config.keep_best else {}
        keep = kept(list(found), self._config, pinned, losses, doubt_of(self._run_dir.events))
        # A newer attempt may have another config: a superseded one must not delete what that one keeps.
        prune(self._run_dir.checkpoints, keep, self._refuse_if_superseded)
