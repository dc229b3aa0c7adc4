"""The newest job of a run, and how it ended, as its files say. No scheduler is asked."""

from gpt.run.json_file import read_json
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir


def read_job(run: RunDir) -> Job | None:
    """The newest job of this very run directory; None before the first, and in a copy of a run.

    Raises ConfigError when job.json is not as it was written.
    """
    job = Job.read(run.job)
    return None if job is None or is_copy(run) else job


def is_copy(run: RunDir) -> bool:
    """Whether this run directory was copied from one that had a job, and has had none of its own yet."""
    content = read_json(run.job)
    return content is not None and content.get("run_inode") != run.path.stat().st_ino


def read_outcome(run: RunDir, job: Job) -> JobOutcome | None:
    """How `job` ended; None while it runs, or when its node was lost. Raises ConfigError as `read_job`."""
    return JobOutcome.read(run.submission(job.submission).outcome)
