"""Checks the mirror of a run (checkpoint.mirror) before the launch."""

from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.remote import is_remote
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.findings import Findings
from launcher.paths import unwritable_problem
from launcher.runs.job_record import is_copy


def check_mirror(run: RunDir, config: RunConfig, findings: Findings, *, is_new: bool) -> None:
    """Find out whether the mirror is reachable and belongs to no other run."""
    place = config.checkpoint.mirror
    if place is None:
        return
    if not is_remote(place):
        if not Path(place).is_dir():
            findings.problem(
                f"checkpoint.mirror = {place} is not a folder. Create it, or mount its file system."
            )
            return
        if (problem := unwritable_problem(Path(place))) is not None:
            findings.problem(f"checkpoint.mirror = {place}: {problem} Use another folder.")
            return
        if Path(place).resolve() == run.path.resolve().parent:
            findings.problem(f"checkpoint.mirror = {place} already holds the run itself. Use another folder.")
            return
    try:
        mirror = Mirror.of(run, place)
        if not mirror.has_bucket():
            findings.problem(
                f"checkpoint.mirror = {place}: this bucket does not exist. Create it, or correct the name."
            )
            return
        is_taken = mirror.run_id() is not None
        if not is_new and not is_copy(run):
            mirror.check_owner(run)
    except (ConfigError, MirrorError) as error:
        findings.problem(f"checkpoint.mirror: {error}")
        return
    if is_new and is_taken:
        findings.problem(
            f"{mirror.place} is the mirror of another run with this name. Continue that run with `outlast "
            f"resume {mirror.place}`, or give the new run another --run-dir or checkpoint.mirror."
        )
    elif is_taken and is_copy(run):
        findings.problem(
            f"{run.path} is a copy, and {mirror.place} is the mirror of the original run. Give the copy "
            "another checkpoint.mirror with --set, or another name."
        )
