"""Saves checkpoints while training goes on: copy at a step boundary, write in the background, then commit.

The ranks' reports (`report`) are summed with the other numbers that they exchange at a step boundary, and
`advance` acts on the sum at the next one, so no step waits for a save. One save is in flight at a time. The
threads are daemons: a disk that hangs must not keep a process from ending.
"""

import time
from importlib.metadata import version

from data_pipeline.errors import CheckpointError
from data_pipeline.sampling.skip_list import Ranges
from gpt.checkpoint.format import CheckpointIndex, FileEntry
from gpt.checkpoint.writer import Pace, temporary_folder
from gpt.config.resume_rules import config_fingerprint
from gpt.distributed.world import World, total
from gpt.distributed.zero.engine import Engine
from gpt.run.attempts import AttemptRemoved, Superseded
from gpt.run.events import Event, record_event
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.committer import Committer
from gpt.saving.rank_writer import RankWriter
from gpt.saving.save_in_flight import Phase, SaveInFlight
from gpt.saving.save_interval import SaveClock

_ROUND_S = 1.0  # how often the ranks exchange reports while they wait for a save
# How long a save may make no progress once a stop is requested: the scheduler's grace time may be running. A
# cancelled thread ends at its next chunk. The fsync of a large file shows no progress for most of a minute.
GIVE_UP_S = 5.0
SILENCE_S = 60.0


class Saver:
    """The checkpoints of one attempt. All ranks call `save`, `advance`, `wait` and `give_up` together."""

    def __init__(
        self,
        run_dir: RunDir,
        engine: Engine,
        world: World,
        *,
        attempt: int,
        data_fingerprint: str,
        heartbeat: Heartbeat,
        stop: StopFlag,
    ) -> None:
        self._run_dir, self._engine, self._world = run_dir, engine, world
        self._heartbeat, self._stop = heartbeat, stop
        self._index = CheckpointIndex(
            step=0,
            attempt=attempt,
            world_size=world.size,
            stage=engine.run.zero.stage,
            layout=engine.layout,
            optimizer_steps=0,
            parameters=engine.parameters,
            groups=engine.groups,
            data_fingerprint=data_fingerprint,
            config_fingerprint=config_fingerprint(engine.run),
            versions={name: version(name) for name in ("torch", "deepspeed")},
            files=(),
        )
        self._writer = RankWriter(run_dir, engine, world, self._index)
        nodes = -(-world.size // world.local_size)
        self._clock = SaveClock.of_run(run_dir, engine.run.checkpoint, nodes, now=time.monotonic())
        self._committer = Committer(run_dir, engine.run.checkpoint, attempt, self._clock)
        self.in_flight: SaveInFlight | None = None
        self._skipped = 0
        self._failure: CheckpointError | None = None

    def is_due(self) -> bool:
        """Whether the clock asks for a save. Only rank 0 asks it; the others learn at the step boundary."""
        return self.in_flight is None and self._world.is_first and self._clock.is_due(time.monotonic())

    def save(self, step: int, skipped: Ranges, *, problem: str | None = None) -> None:
        """Begin to save the state after `step`; training may go on, unless saving is synchronous.

        A `problem` of this rank fails the save as a failing disk would. When a save is in flight, this one is
        skipped and an event counts it. A save that fails is an event too; older checkpoints remain.
        """
        if self.in_flight is not None:
            self._record_skip(step, self.in_flight)
            return
        self._begin(step, skipped, problem)
        if self._writer.snapshot is None:
            self.wait()

    def save_and_wait(self, step: int, skipped: Ranges, *, problem: str | None = None) -> None:
        """Save the state after `step`. Raises CheckpointError on every rank when it is not committed."""
        self.wait()
        self._begin(step, skipped, problem)
        self.wait()
        if self._failure is not None:
            raise self._failure

    def report(self) -> tuple[bool, bool]:
        """Whether this rank has done its part of the save in flight, and whether it failed."""
        return self.in_flight.report() if self.in_flight is not None else (False, False)

    def advance(self, done: float, failed: float) -> None:
        """Act on the ranks' summed reports. Raises Superseded or AttemptRemoved."""
        save = self.in_flight
        if save is None:
            return
        error = save.advance(done, failed, lambda index: self._committer.commit(save, index, self._writer))
        if save.phase is Phase.ENDED:
            self.in_flight = None
        if isinstance(error, (Superseded, AttemptRemoved)):
            raise error
        if error is not None:
            self._record_failure(save, error)

    def wait(self, patience_s: float | None = None) -> None:
        """Wait until no save is in flight, with no limit on its speed.

        Once a stop is requested, a save that makes no progress for `patience_s` (by default SILENCE_S) is
        abandoned: its folder is removed when its thread ends, or at the next start.
        """
        patience_s = SILENCE_S if patience_s is None else patience_s
        reported = -1.0
        last_moved = time.monotonic()
        while (save := self.in_flight) is not None:
            phase = save.phase
            save.pace.lift_limit()
            if save.task is not None:
                save.task.wait(min(_ROUND_S, patience_s))
            is_silent = self._stop.is_requested() and time.monotonic() - last_moved >= patience_s
            done, failed, progress, silent = total(
                self._world, *self.report(), save.pace.bytes_done, is_silent
            )
            has_moved = progress > reported
            if has_moved:  # without progress there is no heartbeat, and the hang watchdog counts from here
                self._heartbeat.beat(save.index.step, "saving")
                reported = progress
            self.advance(done, failed)
            if has_moved or save.phase is not phase:
                last_moved = time.monotonic()
            elif silent:  # on any rank: all of them abandon it in this round
                self._abandon(save, f"its writer made no progress for {patience_s:g} s and is abandoned")

    def give_up(self) -> None:
        """Discard a save that is still being written, and wait until none is in flight."""
        save = self.in_flight
        if save is not None and save.phase is Phase.WRITING:
            if self._world.is_first:
                record_event(self._run_dir.events, Event.CHECKPOINT_GIVEN_UP, step=save.index.step)
            save.discard()
        self.wait(GIVE_UP_S)

    def _begin(self, step: int, skipped: Ranges, problem: str | None) -> None:
        index = self._index.at_step(
            step,
            optimizer_steps=self._engine.optimizer_steps,
            scalars=self._engine.scalars,
            skipped=skipped,
        )
        folder = temporary_folder(self._run_dir.checkpoints, index.attempt, step)
        save = SaveInFlight(self._world, index, folder, Pace(self._engine.run.checkpoint.max_mb_per_s))
        self._clock.begun(save.started)
        self._failure = None
        self._writer.copy_state()

        def write() -> FileEntry:
            if problem is not None:
                raise CheckpointError(problem)
            return self._writer.write(save)

        save.start_writing(write)
        self.in_flight = save

    def _abandon(self, save: SaveInFlight, reason: str) -> None:
        if save.phase is Phase.WRITING:  # what its thread still writes is not committed
            save.discard()
        self.in_flight = None
        self._record_failure(save, CheckpointError(reason))

    def _record_failure(self, save: SaveInFlight, error: CheckpointError) -> None:
        self._failure = error
        if self._world.is_first:
            step, reason = save.index.step, str(error)
            record_event(self._run_dir.events, Event.CHECKPOINT_FAILED, step=step, reason=reason)

    def _record_skip(self, step: int, save: SaveInFlight) -> None:
        self._skipped += 1
        if self._world.is_first:
            age = time.monotonic() - save.started
            record_event(
                self._run_dir.events,
                Event.CHECKPOINT_SKIPPED,
                step=step,
                skipped=self._skipped,
                reason=f"the save of step {save.index.step}, which began {age:.0f} s ago, is still in flight",
            )
