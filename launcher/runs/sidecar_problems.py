"""How the sidecars of a run fare: what they have achieved, and sentences about what they have not.

Reads what the sidecars and the node task write (sidecar-NAME.json), and compares it with what is to be sent.
"""

import time
from collections.abc import Iterator
from typing import Any

from gpt.checkpoint.format import committed
from gpt.config.run import RunConfig
from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from launcher.units import duration

_REMEDIES = {
    Sidecar.TRACKING: "; the next job, or `outlast ui sync RUN_DIR`, sends the rest",
    Sidecar.MIRRORING: "; the next job of the run copies the rest",
}
_SILENT_S = 300.0  # it reports every few seconds; a copy of a checkpoint may take longer than this
_TITLES = {Sidecar.TRACKING: "MLflow", Sidecar.MIRRORING: "the mirror"}


def sidecar_healths(run: RunDir, config: RunConfig | None = None) -> dict[Sidecar, SidecarHealth]:
    """The health of each sidecar that has started; with `config` only of those that it asks for."""
    found = {sidecar: SidecarHealth.read_or_none(run.sidecar_health(sidecar)) for sidecar in Sidecar}
    if config is not None and not config.tracking.enabled:
        found[Sidecar.TRACKING] = None
    if config is not None and config.checkpoint.mirror is None:
        found[Sidecar.MIRRORING] = None
    return {sidecar: health for sidecar, health in found.items() if health is not None}


def sidecar_problem(sidecar: Sidecar, now: SidecarHealth) -> str | None:
    """What keeps a sidecar from its work, as a sentence; None if nothing does."""
    title, error = _TITLES[sidecar], now.error or "no reason is known"
    received = f"; the last step that arrived is {now.step}" if now.step is not None else ""
    match now.health:
        case Health.FAILING:
            return f"{title} does not take what is sent to it, and is tried again ({error}){received}"
        case Health.DEAD:
            return f"the process that sends to {title} is gone and is started again ({error}){received}"
        case Health.INCOMPLETE:
            return f"{title} has not received everything ({error}){received}{_REMEDIES[sidecar]}"
        case _:
            return f"{title}: {error}" if now.error is not None else None


def sidecar_problems(
    run: RunDir, healths: dict[Sidecar, SidecarHealth], *, is_running: bool, has_ended: bool, step: int
) -> Iterator[str]:
    """A sentence for each sidecar that does not work, or whose work is not done although the job has ended.

    `step` is the newest step of the record.
    """
    for sidecar, now in healths.items():
        problem, silent_s = sidecar_problem(sidecar, now), time.time() - now.time
        if problem is not None:
            yield problem
        elif is_running and sidecar is Sidecar.TRACKING and silent_s > _SILENT_S:
            yield f"the process that sends to MLflow has not reported for {duration(silent_s)}"
        elif has_ended and now.health is Health.WORKING:
            newest = step if sidecar is Sidecar.TRACKING else newest_checkpoint(run)
            if newest > (now.step or 0):
                unit = "step" if sidecar is Sidecar.TRACKING else "the checkpoint of step"
                yield f"{_TITLES[sidecar]} has everything up to {unit} {now.step or 0} of {newest} so far"


def health_as_json(healths: dict[Sidecar, SidecarHealth]) -> dict[str, Any]:
    """The healths as one JSON object, by the name of the sidecar."""
    return {sidecar.value: now.model_dump(mode="json") for sidecar, now in healths.items()}


def newest_checkpoint(run: RunDir) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    checkpoints = committed(run.checkpoints)
    return checkpoints[-1][0] if checkpoints else 0
