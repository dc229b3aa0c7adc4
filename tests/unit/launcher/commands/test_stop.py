"""What `outlast stop` says while it waits."""

from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.commands.stop import waits_for
from tests.unit.launcher.commands.support import record_step


def test_stop_says_what_it_waits_for(run: RunDir) -> None:
    assert waits_for(run) == "waiting for the workers to start; they see the request then"
    record_event(run.events, Event.JOB_RUN_STARTED, job="local-1", turn=0)
    record_event(run.events, Event.ATTEMPT_STARTED, attempt=1, world_size=1)
    assert waits_for(run).startswith("waiting for the workers, which are starting")
    record_event(run.events, Event.PHASE, name="first_step", seconds=1.0)
    record_step(run, 7)
    assert waits_for(run) == (
        "step 7 is done; waiting for the next one, which takes about 0:02, and for its checkpoint"
    )
