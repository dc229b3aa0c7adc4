"""How an attempt ends that is asked to stop."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from gpt.attempt import Superseded
from gpt.run_dir import RunDir
from gpt.train import Outcome, Trainer
from tests.unit.saver_support import join, make_saver


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """As much of a Trainer as a stop needs, with a real Saver."""
    run = RunDir(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    world = join(tmp_path / "meeting", 0, 1)
    saver, engine = make_saver(run, world)
    engine.take_step()
    trainer = cast(Any, Trainer.__new__(Trainer))
    trainer.run_dir, trainer.world, trainer.saver = run, world, saver
    trainer.lines = SimpleNamespace(write=lambda: None, problem=None)
    trainer.reader = SimpleNamespace(skipped=())
    yield trainer
    dist.destroy_process_group()


def test_a_stop_that_saves_ends_with_75(trainer: Trainer) -> None:
    cause = "stopped at step 7 (a signal to another rank); everything is saved"
    assert trainer._stop(7) == Outcome(75, cause, 7)


def test_a_stop_that_cannot_save_is_a_failure_after_which_the_run_may_go_on(trainer: Trainer) -> None:
    trainer.run_dir.checkpoints.write_text("a disk that does not take it")
    outcome = trainer._stop(7)
    assert (outcome.exit_code, outcome.step) == (1, 7)
    assert outcome.cause.startswith(
        "stopped at step 7 (a signal to another rank); not saved: rank 0 cannot write its checkpoint: "
    )


def test_a_stop_of_an_older_copy_is_none(trainer: Trainer) -> None:
    trainer.run_dir.attempt(2).mkdir()
    with pytest.raises(Superseded, match="attempt 2 has started since"):
        trainer._stop(7)
