"""Reports how a sidecar fares in its sidecar-NAME.json, which `outlast status` and the foreground read."""

import re
import time
from collections.abc import Callable
from typing import Any

from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir

_USER = re.compile(r"//[^/@\s]+@")  # the user and the password in a URI
_LONGEST_REASON = 500  # MLflow quotes whole web pages; the log has all of it
_REFRESH_S = 10.0  # a sidecar that only goes on as before writes its file this often


class HealthReport:
    """Writes the health of one sidecar; `failed_anew` is called with each failure unlike the last one."""

    def __init__(self, run_dir: RunDir, sidecar: Sidecar, failed_anew: Callable[[str], None]) -> None:
        self._path = run_dir.sidecar_health(sidecar)
        self._failed_anew = failed_anew
        self._now = SidecarHealth.read_or_none(self._path) or SidecarHealth(
            health=Health.WORKING, since=time.time(), time=0.0
        )
        self._written = 0.0
        self._reported: str | None = None

    def note(self, sentence: str) -> None:
        """Tell something that the sidecar decided by itself."""
        print(sentence, flush=True)
        self._write(self._now.model_copy(update={"notes": (*self._now.notes[-9:], sentence)}))

    def succeeded(self, step: int | None, *, warning: str | None = None) -> None:
        """A try succeeded: everything up to `step` has arrived. `warning` is what did not work beside it."""
        if warning is not None and warning != self._now.error:
            print(warning, flush=True)
        self._reported = None
        self._change(Health.WORKING, last_success=time.time(), step=step, error=warning)

    def failed(self, error: Exception) -> None:
        """A try failed; it is repeated."""
        text = _USER.sub("//…@", str(error).strip())
        print(f"{type(error).__name__}: {text}", flush=True)
        reason = text[:_LONGEST_REASON] if " " in text else f"{type(error).__name__}: {text}"
        if self._reported is not None and _without_numbers(reason) == _without_numbers(self._reported):
            reason = self._reported
        if reason != self._reported:
            self._reported = reason
            self._failed_anew(reason)
        self._change(Health.FAILING, error=reason)

    def ended(self, *, is_complete: bool) -> None:
        """The sidecar ends; `is_complete` says whether everything was sent."""
        self._change(Health.DONE if is_complete else Health.INCOMPLETE)

    def _change(self, health: Health, **changes: Any) -> None:
        if health != self._now.health:
            changes["since"] = time.time()
        new = self._now.model_copy(update={**changes, "health": health})
        is_the_same = new.health == self._now.health and new.error == self._now.error
        if is_the_same and time.monotonic() - self._written < _REFRESH_S and self._written:
            self._now = new
            return
        self._write(new)

    def _write(self, new: SidecarHealth) -> None:
        self._now = new.model_copy(update={"time": time.time()})
        self._written = time.monotonic()
        try:
            self._now.write(self._path)
        except OSError as error:
            print(f"{self._path.name} cannot be written: {error}", flush=True)


def _without_numbers(reason: str) -> str:
    """`reason` without what differs at each try: addresses of objects, ports, times."""
    return re.sub(r"0x[0-9a-f]+|[0-9]+", "", reason)
