"""Following a job until it ends."""

from gpt.run.exit_codes import ExitCode
from gpt.run.run_dir import RunDir
from launcher.commands.follow_job import outcome_of
from tests.unit.launcher.support import give_job


def test_a_job_without_an_outcome_counts_as_failed(run: RunDir) -> None:
    outcome = outcome_of(run, give_job(run, alive=False))
    assert outcome.exit_code == ExitCode.FAILED
    assert outcome.cause == (
        "the job ended without reporting an outcome, as when its node fails; its logs are in "
        f"{run.submission(1).path}"
    )
