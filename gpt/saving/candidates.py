"""Finds the checkpoints that a run can continue from; fetches them from the mirror when none is intact here.

Rank 0 does the work and the others learn the result. A mirror that fails is reported and never raises: the
run then continues from what it has.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import OutlastError
from gpt.checkpoint.format import committed
from gpt.checkpoint.mirror import Mirror
from gpt.checkpoint.removal import reject
from gpt.distributed.world import World, from_first
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir


class Candidates:
    """The checkpoints of one run. All ranks call the methods together."""

    def __init__(self, run_dir: RunDir, world: World, mirror: str | None) -> None:
        """`mirror` is checkpoint.mirror of the config."""
        self._run_dir, self._world, self._mirror = run_dir, world, mirror

    def committed(self) -> list[tuple[int, Path]]:
        """Step and folder of every committed checkpoint here, oldest first, as rank 0 sees them."""
        return from_first(self._world, committed(self._run_dir.checkpoints))

    def fetch_again(self, step: int) -> bool:
        """Replace the corrupt checkpoint of `step` by the mirror's copy; whether that is intact."""

        def fetch(mirror: Mirror) -> int | None:
            if step not in mirror.steps():
                return None
            mirror.fetch(step, self._run_dir.checkpoints)
            return step

        return self._fetch(fetch, f"the checkpoint of step {step} is not fetched from the mirror")

    def fetch_newest(self) -> bool:
        """Reject all checkpoints here and fetch the mirror's newest intact one; whether there is one."""

        def fetch(mirror: Mirror) -> int | None:
            if mirror.steps():
                for _, folder in committed(self._run_dir.checkpoints):
                    reject(folder)
            return mirror.fetch_newest(self._run_dir.checkpoints, _log)

        return self._fetch(fetch, "no checkpoint is fetched from the mirror")

    def note_corrupt(self, folder: Path, reason: str) -> None:
        """Record that the checkpoint in `folder` is corrupt and skipped."""
        if self._world.is_first:
            record_event(self._run_dir.events, Event.CHECKPOINT_REJECTED, path=folder.name, reason=reason)
            _log(f"checkpoint {folder.name} is corrupt and skipped: {reason}")

    def continue_from(self, step: int, folder: Path, newer: Sequence[Path]) -> None:
        """Reject the newer checkpoints, which are corrupt, and record that the run continues from `step`."""
        if not self._world.is_first:
            return
        for path in newer:
            reject(path)
        if newer and self._mirror is not None:
            try:
                self._open_mirror(self._mirror).rewind(step)
            except OutlastError as error:
                _log(f"the mirror keeps its checkpoints after step {step}: {error}")
        record_event(self._run_dir.events, Event.RESUMED, step=step, checkpoint=folder.name)

    def _fetch(self, fetch: Callable[[Mirror], int | None], complaint: str) -> bool:
        if self._mirror is None:
            return False
        step = None
        if self._world.is_first:
            try:
                mirror = self._open_mirror(self._mirror)
                step = fetch(mirror)
            except OutlastError as error:
                _log(f"{complaint}: {error}")
            else:
                if step is not None:
                    event = Event.TAKEN_FROM_MIRROR
                    record_event(self._run_dir.events, event, step=step, mirror=mirror.place)
                    _log(f"the checkpoint of step {step} is fetched from the mirror {mirror.place}")
        return from_first(self._world, step is not None)

    def _open_mirror(self, place: str) -> Mirror:
        mirror = Mirror.of(self._run_dir, place)
        mirror.check_owner(self._run_dir)
        return mirror


def _log(line: str) -> None:
    print(line, flush=True)
