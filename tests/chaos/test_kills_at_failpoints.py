"""kill -9 at every failpoint of a save and a prune in real runs leaves the final weights unchanged."""

from collections.abc import Callable

import pytest

from gpt.checkpoint.failpoints import PLACES
from tests.distributed.conftest import Run, data_dir, new_run, same_state

__all__ = ["data_dir", "new_run"]  # fixtures

STEPS = 14
REACHED_BY_EVERY_RANK = PLACES[: PLACES.index("gathered")]  # rank 0 alone commits and prunes


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "agent"])
def test_kills_during_saves_do_not_change_the_weights(
    new_run: Callable[..., Run], stage: int, victim: str
) -> None:
    fields = {"zero__stage": stage, "schedule__total_steps": STEPS, "checkpoint__every_steps": 2}
    fields |= {"checkpoint__keep_last": 2, "launch__max_failures": 100}
    whole, killed = new_run(**fields), new_run(**fields)
    assert whole.train()["exit_code"] == 0
    if victim == "agent":
        for place in PLACES:
            agent = killed.start(cold=True, failpoints=[f"{place}:kill=agent"])
            assert agent.wait(timeout=120) == -9, f"{place}\n{killed.logs()}"
            killed.wait(lambda: not killed.living_workers())
        agent = killed.start(cold=True)
    else:
        places = PLACES if victim == "rank 0" else REACHED_BY_EVERY_RANK
        agent = killed.start(
            max_restarts=len(places), failpoints=[f"{place}:kill@{victim[-1]}" for place in places]
        )
    assert agent.wait(timeout=500) == 0, killed.logs()
    assert killed.result()["exit_code"] == 0
    # The process was killed at each failpoint, so there is one attempt more than failpoints.
    assert len(killed.dir.attempt_numbers()) == 1 + len(
        PLACES if victim != "rank 1" else REACHED_BY_EVERY_RANK
    )
    assert killed.losses() == whole.losses()
    assert same_state(killed.state(STEPS), whole.state(STEPS))
    assert len(killed.steps()) == 2  # the speed of the disk decides which ones: a save may be skipped
    assert not list(killed.dir.checkpoints.glob(".*"))
