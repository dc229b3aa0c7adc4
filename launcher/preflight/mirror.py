"""Checks a run's mirror (checkpoint.mirror) before the launch."""

from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.remote import is_remote
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.findings import Findings
from launcher.runs.job_record import is_copy


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
