"""A run's mirror (checkpoint.mirror) as commands see it: checked before a launch, taken from on a resume."""

from pathlib import Path

import click

from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.remote import is_remote
from gpt.checkpoint.format import committed
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.preflight.findings import Findings
from launcher.scheduler.jobs import is_copy


def check_mirror(run: RunDir, config: RunConfig, findings: Findings, *, is_new: bool) -> None:
    """Whether the mirror can be asked, and is not another run's."""
    place = config.checkpoint.mirror
    if place is None:
        return
    if not is_remote(place):
        if not Path(place).is_dir():
            findings.problem(f"checkpoint.mirror = {place} is no folder. Make it, or mount what it is on.")
            return
        if Path(place).resolve() == run.path.resolve().parent:
            findings.problem(f"checkpoint.mirror = {place} is where the run itself lies; use another place.")
            return
    try:
        mirror = Mirror.of(run, place)
        if not mirror.has_bucket():
            findings.problem(f"checkpoint.mirror = {place}: there is no such bucket. Make it, or correct it.")
            return
        is_taken = mirror.run_id() is not None
        if not is_new and not is_copy(run):
            mirror.check_owner(run)
    except (ConfigError, MirrorError) as error:
        findings.problem(f"checkpoint.mirror: {error}")
        return
    if is_new and is_taken:
        findings.problem(
            f"{mirror.place} is the mirror of another run of this name. `outlast resume {mirror.place}` "
            "continues that; a new run needs another --run-dir or checkpoint.mirror."
        )
    elif is_taken and is_copy(run):
        findings.problem(
            f"{run.path} is a copy, and {mirror.place} is the mirror of the run that it was copied from. A "
            "copy is a run of its own: give it another checkpoint.mirror with --set, or another name."
        )


def fetch_run(place: str, runs: Path) -> RunDir:
    """The run that is mirrored at the URL `place`, brought into the folder `runs`."""
    mirror = Mirror(place)
    run = RunDir(runs / mirror.place.rpartition("/")[2])
    if run.path.exists():
        raise LaunchError(f"{run.path} is there already. `outlast resume {run.path}` asks its mirror too.")
    run.path.parent.mkdir(parents=True, exist_ok=True)
    step = mirror.fetch_run(run, _say)
    what = f"with the checkpoint of step {step}" if step is not None else "without a checkpoint"
    _say(f"{place} is now {run.path}, {what}")
    return run


def fetch_newer(run: RunDir, place: str, step: int | None) -> None:
    """Take `step`, or else the newest checkpoint, from the mirror at `place` where the run has none such.

    Raises MirrorError where the mirror cannot be asked and the run has no checkpoint to go on from.
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
