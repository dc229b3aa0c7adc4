"""How long each phase of a start takes, in events.jsonl."""

import time

from gpt.distributed.world import World
from gpt.run.events import Event, record_event
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir


class StartClock:
    """Records the phases of a start, from rank 0, and sends a heartbeat at the end of each."""

    def __init__(self, run_dir: RunDir, world: World, heartbeat: Heartbeat, started: float) -> None:
        self._run_dir, self._world, self.heartbeat = run_dir, world, heartbeat
        self._last = started

    def lap(self, name: str, seconds: float | None = None) -> None:
        """End the phase `name`: now, or `seconds` after the last one ended."""
        now = time.monotonic() if seconds is None else self._last + seconds
        if self._world.is_first:
            record_event(self._run_dir.events, Event.PHASE, name=name, seconds=round(now - self._last, 3))
        self.heartbeat.beat(0, f"starting, after {name}", is_starting=True)
        self._last = now
