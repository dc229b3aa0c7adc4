"""Real runs save in the background: steps do not wait for a save, and a stop discards it quickly."""

import json
import time
from collections.abc import Callable

from tests.distributed.conftest import Run

NewRun = Callable[..., Run]
# Two ranks with 1.7 MB each: half a minute to write and to read back.
SLOW = {"checkpoint__max_mb_per_s": 0.1, "schedule__total_steps": 100_000, "evaluation__every_steps": 50_000}


def test_training_continues_during_a_save_and_a_stop_does_not_wait_for_it(new_run: NewRun) -> None:
    run = new_run(**SLOW, checkpoint__every_steps=10)
    agent = run.start()
    run.wait(lambda: len(run.events("checkpoint_skipped")) >= 3)
    assert run.steps() == []
    assert [event["step"] for event in run.events("checkpoint_skipped")][:3] == [20, 30, 40]
    asked = time.monotonic()
    run.dir.stop.write_text(json.dumps({"reason": "a test"}))
    assert agent.wait(timeout=60) == 0
    assert time.monotonic() - asked < 10
    assert run.result()["exit_code"] == 75
    assert [event["step"] for event in run.events("checkpoint_given_up")] == [10]
    assert run.steps() == [len(run.losses())]
    assert not list(run.dir.checkpoints.glob(".*"))
