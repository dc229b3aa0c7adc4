"""The merged logs of a run."""

import pytest

from data_pipeline.errors import LaunchError
from gpt.run.run_dir import RunDir
from launcher.commands.logs import lines, log_files


def test_logs_show_the_newest_attempt_and_the_newest_submission(run: RunDir) -> None:
    for submission in ("0001", "0002"):
        (run.submissions / submission).mkdir(parents=True)
        (run.submissions / submission / "node-0.log").write_text(f"agent {submission}\n")
        (run.submissions / submission / "tracking.log").write_text("mirror\n")
    for attempt in (1, 2):
        for node in (0, 1):
            folder = run.attempt(attempt).path / f"node-{node}"
            folder.mkdir(parents=True)
            (folder / f"rank-0000{node}.log").write_text(f"attempt {attempt} on {node}\nno newline")
    newest = list(lines(run, follow=False, attempt=None, node=None))
    assert newest == [
        "[job 0002 node-0] agent 0002",
        "[attempt 2 node-0 rank-00000] attempt 2 on 0",
        "[attempt 2 node-0 rank-00000] no newline",
        "[attempt 2 node-1 rank-00001] attempt 2 on 1",
        "[attempt 2 node-1 rank-00001] no newline",
    ]
    first = list(lines(run, follow=False, attempt=1, node=1))
    assert first == [
        "[attempt 1 node-1 rank-00001] attempt 1 on 1",
        "[attempt 1 node-1 rank-00001] no newline",
    ]
    with pytest.raises(LaunchError, match=r"^there is no attempt 7\. Available attempts: 1, 2\.$"):
        log_files(run, 7, None)
    for wanted in (None, 2):
        with pytest.raises(LaunchError, match=r"^there is no node 9\. Available nodes: 0, 1\.$"):
            list(lines(run, follow=False, attempt=wanted, node=9))
