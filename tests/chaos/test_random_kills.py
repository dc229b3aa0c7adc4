"""kill -9 of any process at random moments: the final weights equal those of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.distributed.conftest import Run, data_dir, new_run, same_state

__all__ = ["data_dir", "new_run"]  # fixtures

KILLS = int(os.environ.get("OUTLAST_KILLS", "20"))


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_random_kills_do_not_change_the_weights(new_run: Callable[..., Run], stage: int) -> None:
    # A constant rate, because the number of steps under the kills is unknown and must not change a number.
    fields = {"zero__stage": stage, "schedule__name": "constant", "checkpoint__every_steps": 7}
    # Kills can come faster than checkpoints; another test covers giving up.
    fields |= {"schedule__total_steps": 1_000_000, "launch__max_failures": 10_000}
    fields |= {"evaluation__every_steps": 1_000_000}
    killed, whole = new_run(**fields), new_run(**fields)
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    agent = killed.start(cold=True, max_restarts=1000)
    for _ in range(KILLS):
        time.sleep(chance.uniform(3.0, 10.0))  # of which a start takes about six
        kill(killed, agent, chance.choice(["agent", "rank 0", "rank 1", "everyone"]))
        if agent.poll() is not None:
            killed.wait(lambda: not killed.living_workers())
            agent = killed.start(cold=True, max_restarts=1000)
    killed.wait(lambda: len(killed.steps()) >= 2)
    agent.kill()
    agent.wait()
    killed.wait(lambda: not killed.living_workers())
    total = killed.steps()[-1] + 10
    for run in (killed, whole):
        run.configure(schedule__total_steps=total)
        assert run.train()["exit_code"] == 0
    assert killed.events("resumed")
    assert killed.losses() == whole.losses()
    assert same_state(killed.state(total), whole.state(total))


def kill(run: Run, agent: "subprocess.Popen[bytes]", victim: str) -> None:
    """kill -9 one process or all at once; a worker may not have started yet, or have ended."""
    workers = run.living_workers()
    if victim.startswith("rank"):
        with suppress(ProcessLookupError, IndexError):
            os.kill(sorted(workers)[int(victim[-1])], signal.SIGKILL)
        return
    agent.kill()
    for pid in workers if victim == "everyone" else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()
