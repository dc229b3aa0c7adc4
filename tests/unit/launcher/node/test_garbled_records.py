"""What a node task makes of records that were damaged: they count as missing, and end nothing."""

from pathlib import Path

import pytest

from gpt.run.events import Event, read_events
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Owner, Result
from gpt.run.run_dir import RunDir
from launcher.node.job_run import JobRun
from launcher.node.rendezvous import report_failure
from launcher.node.torchrun import TorchrunEnd
from launcher.scheduler.local import SCHEDULER
from launcher.scheduler.protocol import NodeIdentity

GARBAGE = ["", "{", "[]", "{}", '{"exit_code": 3, "cause": []}', '{"turn": "x"}', "[" * 100_000]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda text: text[:20])
def test_garbled_owners_results_and_reports_count_as_missing(tmp_path: Path, garbage: str) -> None:
    run = RunDir(tmp_path)
    submission = run.submission(1)
    submission.path.mkdir(parents=True)
    for number in (1, 2, 3):
        run.attempt(number).path.mkdir(parents=True)
    Owner(attempt=1, job="local-7", job_run=0).write(run.attempt(1).owner)
    run.attempt(1).result.write_text(garbage)
    run.attempt(2).owner.write_text(garbage)
    Owner(attempt=3, job="local-8", job_run=0).write(run.attempt(3).owner)
    run.events.write_text(f'{garbage}\n{{"event": []}}\n{{"event": "requeued", "failed": true}}\n')
    identity = NodeIdentity("local-7", 0, 0, 1, "here", "7")
    report_failure(NodeIdentity("local-7", 0, 1, 2, "there", "7"), submission, "no GPU")
    submission.node_failure("local-7", 0, 2).write_text(garbage)
    job_run = JobRun(run, submission, identity, SCHEDULER, 0)
    assert job_run.own_attempt() == 1
    assert not job_run.is_current()
    assert job_run.failures() == ["node there: no GPU"]
    assert job_run.failed_in_a_row() == 1
    outcome = job_run.outcome(TorchrunEnd(1, stopped_now=True), was_signalled=False)
    assert (outcome.exit_code, outcome.attempt) == (ExitCode.FAILED, 1)
    [event] = read_events(run.events, Event.FAILED)
    assert event["requested"]
    assert Result.read(run.attempt(1).result) == Result(exit_code=outcome.exit_code, cause=outcome.cause)
