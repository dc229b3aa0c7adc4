"""Tells while a job is followed how its sidecars fare: each problem once, and when it is over."""

import time
from collections.abc import Iterator

from gpt.run.records import Health, Sidecar
from gpt.run.run_dir import RunDir
from launcher.runs.sidecar_problems import newest_checkpoint, sidecar_healths, sidecar_problem

_POLL_S = 1.0


class SidecarWatch:
    """The sidecars of one run from now on; what they wrote before belongs to an earlier job."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._begun = time.time()
        self._next_look = 0.0
        self._error: dict[Sidecar, str | None] = {}
        self._told_notes: dict[Sidecar, tuple[str, ...]] = {
            sidecar: now.notes for sidecar, now in sidecar_healths(run).items()
        }

    def news(self) -> Iterator[str]:
        """What is new, as sentences; the files are read at most once a second."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _POLL_S
        for sidecar, now in sidecar_healths(self._run).items():
            if now.time < self._begun:
                continue
            told = self._told_notes.get(sidecar, ())
            yield from (f"note: {note}" for note in now.notes if note not in told)
            self._told_notes[sidecar] = now.notes
            problem, before = sidecar_problem(sidecar, now), self._error.get(sidecar)
            cause = now.error if problem is not None else None
            if problem is not None and cause != before:
                yield f"warning: {problem}; training continues"
            elif problem is None and before is not None:
                yield f"the {sidecar.value} sidecar works again"
            self._error[sidecar] = cause

    def last_words(self) -> Iterator[str]:
        """What is left to do for the sidecars when the job has ended, as sentences."""
        for sidecar, now in sidecar_healths(self._run).items():
            if now.time < self._begun:
                continue
            newest = newest_checkpoint(self._run) if sidecar is Sidecar.MIRRORING else 0
            if (problem := sidecar_problem(sidecar, now)) is not None:
                yield f"warning: {problem}"
            elif now.health is Health.WORKING and newest > (now.step or 0):
                yield (
                    f"the checkpoint of step {newest} is still being copied to the mirror; `outlast status "
                    f"{self._run.path}` shows when it is there"
                )
