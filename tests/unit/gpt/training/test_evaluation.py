"""The loss on the validation split is exact, and a stop request ends its computation soon."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from data_pipeline.sampling.batch import Batch
from data_pipeline.sampling.evaluation import EvaluationReader
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.config.data import DataConfig
from gpt.distributed.world import World
from gpt.model.loss import IGNORED
from gpt.run.heartbeat import Heartbeat
from gpt.run.stop import StopFlag
from gpt.training.evaluation import Validation
from tests.distributed.data import small_data_set
from tests.unit.gpt.saving.support import join

ROUNDS, CONTEXT = 20, 32


class Model:
    """Two nats for each scored token. Requests a stop in the round `asks_at`."""

    def __init__(self, asks_at: int | None = None) -> None:
        self.stop, self.asks_at, self.rounds, self.is_training = StopFlag(), asks_at, 0, True

    def __call__(self, _tokens: Tensor, targets: Tensor, *_: Any) -> Tensor:
        self.rounds += 1
        if self.rounds == self.asks_at:
            self.stop.reason = "SIGTERM"
        return 2.0 * (targets != IGNORED).sum()

    def eval(self) -> None:
        self.is_training = False

    def train(self) -> None:
        self.is_training = True


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data_set(tmp_path_factory.mktemp("data") / "kjv")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process alone."""
    yield join(tmp_path / "meeting", 0, 1)
    dist.destroy_process_group()


def scores(data: Path, world: World, model: Model, stop: StopFlag | None) -> dict[str, float] | None:
    token_bytes = np.full(len(load_encoding(data).token_bytes()), 4, np.int64)
    validation = Validation(DataConfig(path=data), CONTEXT, ROUNDS * 2 * CONTEXT, 2, token_bytes)
    return validation.measure(cast(Any, model), world, Heartbeat(), 5, stop)


def test_evaluation_scores_every_window_once(data: Path, alone: World) -> None:
    model = Model()
    found = scores(data, alone, model, model.stop)
    assert found is not None
    assert found["val/loss"] == 2.0
    assert found["val/perplexity"] == pytest.approx(7.389056)
    assert found["val/bits_per_byte"] == pytest.approx(2.0 / np.log(2) / 4)
    assert (model.rounds, model.is_training) == (ROUNDS, True)


def test_scores_are_zero_without_a_scored_token(
    data: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the document mask, an adopted data set may have documents of one end-of-text token only."""
    windows = EvaluationReader.windows

    def nothing_scored(self: EvaluationReader, *place: int) -> Batch:
        batch = windows(self, *place)
        return replace(batch, scored=np.zeros_like(batch.scored))

    monkeypatch.setattr(EvaluationReader, "windows", nothing_scored)
    found = scores(data, alone, Model(), None)
    assert found is not None
    assert (found["val/loss"], found["val/bits_per_byte"]) == (0.0, 0.0)


def test_stop_request_ends_the_evaluation_within_two_rounds(data: Path, alone: World) -> None:
    model = Model(asks_at=3)
    assert scores(data, alone, model, model.stop) is None
    assert model.rounds <= 5
    assert model.is_training


def test_evaluation_of_the_last_step_ignores_a_stop_request(data: Path, alone: World) -> None:
    model = Model(asks_at=3)
    assert scores(data, alone, model, None) is not None
    assert model.rounds == ROUNDS
