"""kill -9 at random moments, of anyone: the final weights are those of a run that nobody touched."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.distributed.conftest import Run, data_dir, new_run, same_state

__all__ = ["data_dir", "new_run"]  # fixtures

KILLS = int(os.environ.get("OUTLAST_KILLS", "20"))
STEPS = 300


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [1, 2])
def test_random_kills_leave_no_trace(new_run: Callable[..., Run], stage: int) -> None:
    fields = {"zero__stage": stage, "schedule__total_steps": STEPS, "checkpoint__every_steps": 7}
    # Kills can come faster than checkpoints: giving up is another test's matter.
    fields |= {"launch__max_failures": 10_000}
    whole, tormented = new_run(**fields), new_run(**fields)
    assert whole.train()["exit_code"] == 0
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(KILLS):
        agent = tormented.start(max_restarts=100)
        time.sleep(chance.uniform(4.0, 15.0))
        victim = chance.choice(["agent", "rank 0", "rank 1"])
        # It may not be there yet, or not any more.
        with contextlib.suppress(ProcessLookupError, IndexError, AssertionError):
            agent.kill() if victim == "agent" else tormented.kill_worker(int(victim[-1]), signal.SIGKILL)
        if victim != "agent":
            time.sleep(chance.uniform(0.0, 3.0))
            agent.kill()
        agent.wait()
        if tormented.steps() and tormented.steps()[-1] == STEPS:
            break
    if not tormented.steps():  # every kill came before the first checkpoint: one more, after it
        agent = tormented.start()
        tormented.wait(lambda: tormented.steps() != [])
        agent.kill()
        agent.wait()
    tormented.wait(lambda: not tormented.living_workers())
    assert tormented.train()["exit_code"] == 0
    assert tormented.events("resumed")  # some kill came after a checkpoint
    assert tormented.losses() == whole.losses()
    assert same_state(tormented.state(STEPS), whole.state(STEPS))
