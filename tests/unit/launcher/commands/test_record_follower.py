"""Following a run's record from the outside."""

from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.commands.record_follower import RecordFollower
from tests.unit.launcher.commands.support import record_step
from tests.unit.launcher.support import give_job


def test_a_follower_starts_at_the_end_of_the_record(run: RunDir) -> None:
    record_step(run, 1)
    follower = RecordFollower(run)
    record_step(run, 2)
    record_event(run.events, Event.RESUMED, step=1)
    [update] = follower.updates(give_job(run, alive=False))
    assert [line["step"] for line in update.metrics] == [2]
    assert [event["event"] for event in update.events] == ["resumed"]


def test_a_follower_continues_after_a_restart_has_cut_the_record_back(run: RunDir) -> None:
    follower = RecordFollower(run)
    seen = []
    updates = follower.updates(give_job(run, alive=True))
    for number in (1, 2, 3):
        record_step(run, number)
    seen.append([line["step"] for line in next(updates).metrics])
    record.cut_back(run.metrics, 1)
    seen.append([line["step"] for line in next(updates).metrics])
    record_step(run, 2)
    with run.metrics.open("a") as torn:
        torn.write('{"step": 3, ')
    seen.append([line["step"] for line in next(updates).metrics])
    assert seen == [[1, 2, 3], [], [2]]
