"""Saving while training goes on: copy at a boundary, write behind it, commit once every rank has written.

A save goes through phases, in which all the ranks are at the same boundary:

    writing     each rank's thread writes its file, fsyncs it and reads it back
    gathering   the ranks tell rank 0 what the index says of their files
    committing  rank 0's thread syncs the record, writes the index, renames the folder, prunes
    discarding  instead, where a rank failed or the save is not wanted any more: each removes its file

What the ranks have to say (`report`) travels with the tick of a step boundary, and its sum is taken in at
the next (`advance`), so that no step waits for a save. One save is in flight at a time. The thread is a
daemon: a disk that hangs must not keep a process from ending.
"""

import errno
import os
import shutil
import struct
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from importlib.metadata import version
from pathlib import Path

from data_pipeline.errors import CheckpointError
from data_pipeline.sampling.skip_list import Ranges
from gpt.checkpoint.failpoints import reach
from gpt.checkpoint.format import (
    CheckpointIndex,
    FileEntry,
    committed,
    is_pinned,
    rank_name,
    rank_tensors,
)
from gpt.checkpoint.retention import kept
from gpt.checkpoint.writer import (
    Pace,
    commit,
    discard,
    prune,
    read_back,
    temporary_folder,
    write_rank_file,
)
from gpt.config.resume_rules import config_fingerprint
from gpt.distributed.world import PendingGather, World, gather, total
from gpt.distributed.zero.engine import Engine
from gpt.run import record
from gpt.run.attempts import Superseded, refuse_if_superseded
from gpt.run.events import Event, record_event
from gpt.run.heartbeat import Heartbeat
from gpt.run.host_memory import LARGEST_SHARE, available_bytes
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.background_task import Work
from gpt.saving.save_interval import SaveClock, failures_so_far, time_between_failures_s
from gpt.saving.snapshot import Snapshot, live_parts

_ROUND_S = 1.0  # how often the ranks look at each other while they wait for a save
# Once a stop is asked for, behind which a grace time may be running. A thread that is told to end does so at
# its next chunk; the sync of a large file moves no byte that could be seen, and may take most of a minute.
GIVE_UP_S = 5.0
SILENCE_S = 60.0


class _Phase(Enum):
    WRITING = auto()
    GATHERING = auto()
    COMMITTING = auto()
    DISCARDING = auto()


@dataclass
class _Save:
    """A save in flight, as this rank sees it."""

    index: CheckpointIndex  # without its files, until they are gathered
    folder: Path
    pace: Pace
    stall_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    phase: _Phase = _Phase.WRITING
    work: Work | None = None
    entries: PendingGather | None = None


class Saver:
    """The checkpoints of one attempt. All ranks call `save`, `advance`, `wait` and the like together."""

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
        self._run_dir, self._engine, self._world, self._attempt = run_dir, engine, world, attempt
        self._heartbeat, self._stop, self._config = heartbeat, stop, engine.run.checkpoint
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
        self._tensors = rank_tensors(self._index, world.rank)
        self._snapshot = self._make_snapshot()
        self._clock = self._make_clock()
        self._save: _Save | None = None
        self._skipped = 0
        self._failure: CheckpointError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight."""
        return self._save is not None

    def is_due(self) -> bool:
        """Whether the clock asks for a save: on rank 0, which tells the others with its tick."""
        return self._save is None and self._world.is_first and self._clock.is_due(time.monotonic())

    def save(self, step: int, skipped: Ranges, *, problem: str | None = None) -> None:
        """Begin to save the state after `step`; training may go on, unless saving is synchronous.

        A `problem` of this rank fails the save as if its disk had. With a save in flight this one is
        skipped, which an event counts. A save that fails is an event too: older checkpoints stand.
        """
        if self._save is not None:
            self._skip(step)
            return
        self._begin(step, skipped, problem)
        if self._snapshot is None:
            self.wait()

    def save_and_wait(self, step: int, skipped: Ranges, *, problem: str | None = None) -> None:
        """Save the state after `step`. Raises CheckpointError on every rank where it is not committed."""
        self.wait()
        self._begin(step, skipped, problem)
        self.wait()
        if self._failure is not None:
            raise self._failure

    def report(self) -> tuple[bool, bool]:
        """Whether this rank has done its part of the save in flight, and whether it failed at it."""
        work = self._save.work if self._save is not None else None
        is_done = work is not None and work.is_done()
        return is_done, is_done and work is not None and work.error is not None

    def advance(self, done: float, failed: float) -> None:
        """Go on with what the ranks reported, summed. Raises Superseded when the run has another owner."""
        save = self._save
        if save is None:
            return
        match save.phase:
            case _Phase.WRITING if failed:
                self._fail(save)
            case _Phase.WRITING if done == self._world.size:
                assert save.work is not None and save.work.entry is not None
                save.entries = PendingGather(self._world, *_as_integers(save.work.entry))
                save.phase, save.work = _Phase.GATHERING, None
            case _Phase.GATHERING:
                assert save.entries is not None
                files = tuple(_as_entry(r, values) for r, values in enumerate(save.entries.result()))
                index = save.index.model_copy(update={"files": files})
                save.phase = _Phase.COMMITTING
                save.work = Work(lambda: self._commit(save, index)) if self._world.is_first else None
            case _Phase.COMMITTING if failed:
                self._fail(save)
            case _Phase.COMMITTING if done:
                self._save = None
            case _Phase.DISCARDING if done == self._world.size:
                self._save = None

    def wait(self, patience_s: float | None = None) -> None:
        """Until no save is in flight, at full speed.

        Once a stop is asked for, one that makes no progress for `patience_s` is left to its thread: its
        folder goes when that ends, or at the next start. The default is SILENCE_S.
        """
        patience_s = SILENCE_S if patience_s is None else patience_s
        reported = -1.0
        last_moved = time.monotonic()
        while (save := self._save) is not None:
            phase = save.phase
            save.pace.hurry()
            if save.work is not None:
                save.work.wait(min(_ROUND_S, patience_s))
            is_silent = self._stop.is_requested() and time.monotonic() - last_moved >= patience_s
            done, failed, progress, silent = total(
                self._world, *self.report(), save.pace.bytes_done, is_silent
            )
            has_moved = progress > reported
            if has_moved:  # else it is silent: the hang watchdog counts from here
                self._heartbeat.beat(save.index.step, "saving")
                reported = progress
            self.advance(done, failed)
            if has_moved or save.phase is not phase:
                last_moved = time.monotonic()
            elif silent:  # on any rank: all of them leave it in this round
                self._abandon(save, f"its writer did nothing for {patience_s:g} s and is left behind")

    def give_up(self) -> None:
        """Give up a save that is still being written, and wait until nothing is in flight."""
        if self._save is not None and self._save.phase is _Phase.WRITING:
            if self._world.is_first:
                record_event(self._run_dir.events, Event.CHECKPOINT_GIVEN_UP, step=self._save.index.step)
            self._discard(self._save)
        self.wait(GIVE_UP_S)

    def _abandon(self, save: _Save, reason: str) -> None:
        if save.phase is _Phase.WRITING:  # whatever its thread still does is not committed
            self._discard(save)
        self._save, self._failure = None, CheckpointError(reason)
        if self._world.is_first:
            record_event(self._run_dir.events, Event.CHECKPOINT_FAILED, step=save.index.step, reason=reason)

    def _make_clock(self) -> SaveClock:
        nodes = -(-self._world.size // self._world.local_size)
        failures, seconds = failures_so_far(record.read(self._run_dir.events))
        return SaveClock(
            self._config, time_between_failures_s(nodes, failures, seconds), now=time.monotonic()
        )

    def _make_snapshot(self) -> Snapshot | None:
        """The host buffer, if the config wants one and every node has the memory for those of its ranks."""
        if not self._config.asynchronous:
            return None
        numel = sum(self._tensors.values())
        needed, available = 4 * numel * self._world.local_size, available_bytes()
        (short,) = total(self._world, needed > LARGEST_SHARE * available)
        if not short:
            return Snapshot(numel, self._world.device)
        if self._world.is_first:
            reason = (
                f"{short:.0f} of {self._world.size} ranks are on nodes without the memory for a copy of the "
                f"state; on this one it needs {needed >> 20} MiB, {available >> 20} MiB are left"
            )
            record_event(self._run_dir.events, Event.SAVING_SYNCHRONOUSLY, reason=reason)
        return None

    def _begin(self, step: int, skipped: Ranges, problem: str | None) -> None:
        started = time.monotonic()
        self._clock.begun(started)
        self._failure = None
        folder = temporary_folder(self._run_dir.checkpoints, self._attempt, step)
        now = {
            "step": step,
            "optimizer_steps": self._engine.optimizer_steps,
            "scalars": self._engine.scalars,
            "skipped": skipped,
        }
        save = _Save(self._index.model_copy(update=now), folder, Pace(self._config.max_mb_per_s))
        if self._snapshot is not None:
            self._snapshot.take(self._engine.state())
        reach("copied")
        save.stall_s = time.monotonic() - started
        save.work = Work(lambda: self._write(save, problem))
        self._save = save

    def _skip(self, step: int) -> None:
        assert self._save is not None
        self._skipped += 1
        if self._world.is_first:
            age = time.monotonic() - self._save.started
            reason = f"the save of step {self._save.index.step}, begun {age:.0f} s ago, is still under way"
            record_event(
                self._run_dir.events,
                Event.CHECKPOINT_SKIPPED,
                step=step,
                skipped=self._skipped,
                reason=reason,
            )

    def _write(self, save: _Save, problem: str | None) -> FileEntry:
        if problem is not None:
            raise CheckpointError(problem)
        parts = self._snapshot.parts() if self._snapshot is not None else live_parts(self._engine.state())
        try:
            save.folder.mkdir(parents=True, exist_ok=True)
            reach("folder_made")
            if self._world.is_first:
                _check_room(save)
            entry = write_rank_file(save.folder, self._world.rank, self._tensors, parts, pace=save.pace)
            read_back(save.folder, entry, self._tensors, pace=save.pace)
            reach("read_back")
        except OSError as error:
            raise CheckpointError(f"rank {self._world.rank} cannot write its checkpoint: {error}") from error
        return entry

    def _commit(self, save: _Save, index: CheckpointIndex) -> None:
        run_dir = self._run_dir
        reach("gathered")
        record.sync(run_dir.metrics)
        reach("record_synced")
        self._stay_the_run()
        commit(run_dir.checkpoints, save.folder, index)
        seconds = time.monotonic() - save.started
        stall_s = save.stall_s + self._snapshot.device_seconds() if self._snapshot is not None else seconds
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
        try:
            self._prune()
        except OSError as error:
            record_event(run_dir.events, Event.PRUNE_FAILED, reason=str(error))

    def _stay_the_run(self) -> None:
        """Raise Superseded where another copy of the run has started since."""
        refuse_if_superseded(self._run_dir, self._attempt)

    def _prune(self) -> None:
        there = dict(committed(self._run_dir.checkpoints))
        pinned = [step for step, folder in there.items() if is_pinned(folder)]
        losses = record.val_losses(self._run_dir.metrics) if self._config.keep_best else {}
        # What a newer copy keeps, whose config may be another, is not this one's to delete.
        prune(self._run_dir.checkpoints, kept(list(there), self._config, pinned, losses), self._stay_the_run)

    def _fail(self, save: _Save) -> None:
        """Learn why, say it once, and remove what was written."""
        error = save.work.error if save.work is not None and save.work.is_done() else None
        self._failure = next(e for e in gather(self._world, error) if e is not None)
        self._discard(save)
        if isinstance(self._failure, Superseded):
            raise self._failure
        if self._world.is_first:
            reason = str(self._failure)
            record_event(self._run_dir.events, Event.CHECKPOINT_FAILED, step=save.index.step, reason=reason)

    def _discard(self, save: _Save) -> None:
        writing = save.work
        save.pace.cancel()

        def remove() -> None:
            if writing is not None:
                writing.wait()
            discard(save.folder, self._world.rank)

        save.phase, save.work = _Phase.DISCARDING, Work(remove)


def _check_room(save: _Save) -> None:
    """Raise OSError before anything is written where the whole checkpoint would not fit."""
    needed = sum(4 * group.numel * len(group.states) for group in save.index.groups)
    free = shutil.disk_usage(save.folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB, {free >> 20} are free")


def _as_integers(entry: FileEntry) -> tuple[int, int, int]:
    """Size and checksum of a file as integers of 64 bits, for a tensor."""
    size, high, low = struct.unpack("<qqq", struct.pack("<q", entry.size) + bytes.fromhex(entry.checksum))
    return size, high, low


def _as_entry(rank: int, values: tuple[int, ...]) -> FileEntry:
    size, high, low = values
    return FileEntry(name=rank_name(rank), size=size, checksum=struct.pack("<qq", high, low).hex())
