"""kill -9 at random moments, of anyone: the final weights are those of a run that nobody touched."""

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
    # A constant rate: how far the run comes under the kills is not known, and may not change a number.
    fields = {"zero__stage": stage, "schedule__name": "constant", "checkpoint__every_steps": 7}
    # Kills can come faster than checkpoints: giving up is another test's matter.
    fields |= {"schedule__total_steps": 1_000_000, "launch__max_failures": 10_000}
    fields |= {"evaluation__every_steps": 1_000_000}
    tormented, whole = new_run(**fields), new_run(**fields)
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    agent = tormented.start(max_restarts=1000)
    for _ in range(KILLS):
        time.sleep(chance.uniform(3.0, 10.0))  # a start takes about six seconds of them
        kill(tormented, agent, chance.choice(["agent", "rank 0", "rank 1", "everyone"]))
        if agent.poll() is not None:
            tormented.wait(lambda: not tormented.living_workers())
            agent = tormented.start(max_restarts=1000)
    tormented.wait(lambda: len(tormented.steps()) >= 2)
    agent.kill()
    agent.wait()
    tormented.wait(lambda: not tormented.living_workers())
    total = tormented.steps()[-1] + 10
    for run in (tormented, whole):
        run.configure(schedule__total_steps=total)
        assert run.train()["exit_code"] == 0
    assert tormented.events("resumed")
    assert tormented.losses() == whole.losses()
    assert same_state(tormented.state(total), whole.state(total))


def kill(run: Run, agent: "subprocess.Popen[bytes]", victim: str) -> None:
    """kill -9 one of them, or all at once; a worker may not be there yet, or not any more."""
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
