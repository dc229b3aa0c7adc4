"""How `outlast resume` uses a run's mirror (checkpoint.mirror): it fetches what this machine lacks."""

from pathlib import Path

import click

from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.remote import is_remote
from gpt.checkpoint.format import committed
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.run.run_dir import RunDir
from launcher.paths import absolute, new_folder_problem
from launcher.runs.trust import TRUST_OPTION, executed_fields


def is_mirrored_run(folder: str) -> bool:
    """Whether `folder` is a run in a mirror: a URL, or a folder without a run's code and attempts."""
    if is_remote(folder):
        return True
    run = RunDir(absolute(folder))
    own = run.code, run.attempts, run.submissions, run.job
    return run.config.exists() and not any(path.exists() for path in own)


def fetch_run(place: str, runs: Path, *, keeps_cluster: bool, is_trusted: bool) -> RunDir:
    """Fetch the run that is mirrored at `place`, a URL or a folder, into the folder `runs`.

    `keeps_cluster` says whether the run continues with its cluster.json. Whoever can write to the mirror can
    write that, so one with commands for the nodes is refused with ConfigError, unless `is_trusted`.
    """
    place = place if is_remote(place) else str(absolute(place))
    mirror = Mirror(place)
    run = RunDir(runs / mirror.place.rpartition("/")[2])
    if run.path.exists():
        if not is_remote(place) and run.path.samefile(place):
            raise LaunchError(
                f"{run.path} is the mirror itself. Set OUTLAST_RUNS to the folder in which the run shall "
                "continue, and resume it again."
            )
        raise LaunchError(f"{run.path} is there already. `outlast resume {run.path}` uses its mirror too.")
    if (problem := new_folder_problem(run.path)) is not None:
        raise ConfigError(f"{problem} Set OUTLAST_RUNS to the folder in which the run shall continue.")
    executed = executed_fields(mirror.cluster())
    if executed and keeps_cluster and not is_trusted:
        raise ConfigError(
            f"{place} has a {run.cluster.name} that decides what the nodes execute: {executed}. Whoever can "
            "write to the mirror can change it. Give the cluster with --cluster, or accept this one with "
            f"{TRUST_OPTION}."
        )
    run.path.parent.mkdir(parents=True, exist_ok=True)
    # A later resume must not find what nobody has accepted.
    step = mirror.fetch_run(run, _say, () if is_trusted or not executed else (run.cluster,))
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
