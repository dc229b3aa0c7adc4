"""How `outlast resume` uses a run's mirror (checkpoint.mirror): it fetches what this machine lacks."""

from pathlib import Path

import click

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import committed
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.run.run_dir import RunDir


def fetch_run(place: str, runs: Path) -> RunDir:
    """Fetch the run that is mirrored at the URL `place` into the folder `runs`."""
    mirror = Mirror(place)
    run = RunDir(runs / mirror.place.rpartition("/")[2])
    if run.path.exists():
        raise LaunchError(f"{run.path} is there already. `outlast resume {run.path}` uses its mirror too.")
    run.path.parent.mkdir(parents=True, exist_ok=True)
    step = mirror.fetch_run(run, _say)
    what = f"with the checkpoint of step {step}" if step is not None else "without a checkpoint"
    _say(f"{place} is now {run.path}, {what}")
    return run


def fetch_newer(run: RunDir, place: str, step: int | None) -> None:
    """Fetch `step`, or by default the newest checkpoint, from the mirror at `place` if the run lacks it.

    Raises MirrorError if the mirror does not answer and the run has no checkpoint to continue from.
    """
    here = [number for number, _ in committed(run.checkpoints)]
    if step in here:
        return
    try:
        mirror = Mirror.of(run, place)
        if step is None:
            taken = mirror.fetch_newest(run.checkpoints, _say, newer_than=max(here, default=-1))
        elif taken := step if step in mirror.steps() else None:
            mirror.fetch(taken, run.checkpoints)
    except MirrorError as error:
        if not here or step is not None:
            raise
        _say(f"warning: {error}")
        return
    if taken is not None:
        _say(f"step {taken} is taken from the mirror {mirror.place}")


def _say(text: str) -> None:
    click.echo(text, err=True)
