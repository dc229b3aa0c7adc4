"""A Saver with a small state and without a real engine, in one process or several.

`python -m tests.unit.gpt.saving.support RUN_DIR STEP…` saves those steps in order.
"""

import inspect
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gpt.checkpoint import failpoints
from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.checkpoint.layout import GroupLayout
from gpt.config.data import DataConfig
from gpt.config.optimizer import ScheduleConfig
from gpt.config.run import CheckpointConfig, RunConfig
from gpt.distributed.world import World
from gpt.distributed.zero.state import StatePart
from gpt.run import record
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.saver import Saver

NUMEL = 1_200_000  # 14 MB in all: several chunks a rank
STATES = ("master", "exp_avg", "exp_avg_sq")


def expected_state(step: int, state: str) -> np.ndarray:
    """The whole flat state after `step`, whatever the world."""
    return np.random.default_rng([step, STATES.index(state)]).random(NUMEL, dtype=np.float32)


class SmallEngine:
    """The part of an engine that a Saver uses."""

    layout = "flat"
    parameters = (ParameterEntry(name="w", shape=(NUMEL,), group="decay", offset=0),)

    def __init__(self, rank: int, world_size: int, **checkpoint: Any) -> None:
        partition = -(-NUMEL // world_size)
        self.run = RunConfig(
            name="small",
            data=DataConfig(path=Path("/nowhere")),
            schedule=ScheduleConfig(total_steps=1000),
            checkpoint=CheckpointConfig(**{"keep_last": 2, **checkpoint}),
        )
        self.groups = (
            GroupEntry(
                name="decay",
                numel=NUMEL,
                partition_numel=partition,
                states=STATES,
                hyperparameters={"weight_decay": 0.1},
            ),
        )
        ((self._start, self._end),) = GroupLayout("flat", world_size, [NUMEL], partition).extents(rank)
        self.optimizer_steps = 0
        self.scalars = {"initial_lr": 0.0}

    def take_step(self) -> None:
        self.optimizer_steps += 1
        self._state = {s: torch.from_numpy(expected_state(self.optimizer_steps, s)) for s in STATES}

    def state(self) -> Iterator[StatePart]:
        for name, whole in self._state.items():
            yield StatePart("decay", name, self._start, self._end, whole[self._start : self._end])

    def prepare_load(self, optimizer_steps: int) -> None:
        self.take_step()  # values that a load must replace
        self.optimizer_steps = optimizer_steps

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        self.scalars = dict(scalars)

    def finish_load(self) -> None:
        pass

    def holds(self, step: int) -> bool:
        """Whether this rank's part of the state is that after `step`."""
        return all(
            np.array_equal(part.tensor.numpy(), expected_state(step, part.state)[self._start : self._end])
            for part in self.state()
        )


def join(meeting: Path, rank: int, size: int) -> World:
    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), size), rank=rank, world_size=size)
    control = dist.new_group(backend="gloo")
    return World(rank, size, rank, size, 0, torch.device("cpu"), control)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process alone."""
    yield join(tmp_path / "meeting", 0, 1)
    dist.destroy_process_group()


def make_saver(
    run_dir: RunDir, world: World, stop: StopFlag | None = None, **checkpoint: Any
) -> tuple[Saver, SmallEngine]:
    engine = SmallEngine(world.rank, world.size, **checkpoint)
    saver = Saver(
        run_dir,
        cast(Any, engine),
        world,
        attempt=1,
        data_fingerprint="d",
        heartbeat=Heartbeat(),
        stop=stop or StopFlag(),
    )
    return saver, engine


def save_steps(folder: Path, meeting: Path, rank: int, size: int, steps: Sequence[int]) -> None:
    """One rank of a run that saves `steps`, and records every step."""
    run_dir = RunDir(folder)
    world = join(meeting, rank, size)
    saver, engine = make_saver(run_dir, world)
    for step in range(1, steps[-1] + 1):
        engine.take_step()
        if world.is_first:
            record.append(run_dir.metrics, step=step)
        if step in steps:
            saver.save_and_wait(step, ())
    dist.destroy_process_group()


def save_in_two_processes(folder: Path, steps: Sequence[int], failpoint: str = "", at: int = 0) -> bool:
    """Save `steps` from two ranks, with `failpoint` set in rank `at`; whether it killed that rank."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once for all
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    ranks = [
        context.Process(target=_rank, args=(folder, meeting, rank, steps, failpoint if rank == at else ""))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    ranks[at].join(60)
    if ranks[at].exitcode != 0:
        ranks[1 - at].kill()  # as the agent does
    ranks[1 - at].join(60)
    assert ranks[at].exitcode in (0, -9), ranks[at].exitcode
    return ranks[at].exitcode != 0


def _rank(folder: Path, meeting: Path, rank: int, steps: Sequence[int], failpoint: str) -> None:
    os.environ["OUTLAST_FAILPOINTS"] = failpoint
    save_steps(folder, meeting, rank, 2, steps)


def arm(patch: pytest.MonkeyPatch, failpoint: str) -> None:
    """Set a failpoint in this process."""
    patch.setenv("OUTLAST_FAILPOINTS", failpoint)
    patch.setattr(failpoints, "armed_failpoint", inspect.unwrap(failpoints.armed_failpoint))


if __name__ == "__main__":
    run = Path(sys.argv[1])
    save_steps(run, run / "meeting", 0, 1, [int(step) for step in sys.argv[2:]])
