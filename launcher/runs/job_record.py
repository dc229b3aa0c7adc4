"""The newest job of a run and how it ended, read from its files without asking a scheduler."""

from gpt.run.json_file import read_json
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir


def read_job(run: RunDir) -> Job | None:
    """The newest job of this run directory; None before the first one, and in a copy of a run.

    Raises ConfigError when job.json is damaged.
    """
    job = Job.read(run.job)
    return None if job is None or is_copy(run) else job


def is_copy(run: RunDir) -> bool:
    """Whether this run directory is a copy of one that had a job, and has had no job of its own yet."""
    content = read_json(run.job)
    return content is not None and content.get("run_inode") != run.path.stat().st_ino


def read_outcome(run: RunDir, job: Job) -> JobOutcome | None:
    """How `job` ended; None while it runs, or if its node was lost. Raises ConfigError like `read_job`."""
    return JobOutcome.read(run.submission(job.submission).outcome)
