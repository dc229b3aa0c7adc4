"""Rewinding a run: an earlier checkpoint becomes the newest, here and at the mirror."""

import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.durable import fsync_folder
from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import committed, verify
from gpt.checkpoint.mirror import Mirror
from gpt.run.run_dir import REWOUND_PREFIX, RunDir


def rewind(
    run_dir: RunDir, step: int, mirror: str | None, report: Callable[[str], None] = lambda _: None
) -> list[tuple[int, Path]]:
    """Make the checkpoint of `step` the newest one; step and new path of each later one, which is renamed.

    Nothing is deleted. Every byte of the checkpoint is verified first, which takes a while: `report` receives
    a line about it. `mirror` is checkpoint.mirror of the config. Raises LaunchError when there is no intact
    checkpoint of `step`.
    """
    checkpoints = committed(run_dir.checkpoints)
    steps = [number for number, _ in checkpoints]
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise LaunchError(f"there is no checkpoint of step {step}. Available steps: {known}.")
    report(f"verifying every byte of the checkpoint of step {step}")
    bad = next(verify(dict(checkpoints)[step]), None)
    if bad is not None:
        others = ", ".join(str(number) for number in steps if number != step) or "none"
        raise LaunchError(f"the checkpoint of step {step} is corrupt: {bad}. Other checkpoints: {others}.")
    if mirror is not None:
        Mirror.of(run_dir, mirror).rewind(step)
    prefix = f"{REWOUND_PREFIX}{int(time.time())}-"
    later = [
        (number, folder.rename(folder.with_name(prefix + folder.name)))
        for number, folder in checkpoints
        if number > step
    ]
    fsync_folder(run_dir.checkpoints)
    return later
