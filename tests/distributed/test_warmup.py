"""schedule.warmup = "auto" in a real run: which rate it chooses, and that it chooses once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.sampling.batches import BatchReader
from gpt.config.run import RunConfig
from gpt.model.gpt import GPT
from gpt.training.step import model_inputs
from tests.distributed.conftest import Run
from tests.distributed.test_numbers import CPU, PlainOptimizer

PEAK = 0.3


def test_warmup_starts_at_the_critical_rate_which_is_searched_once(
    new_run: Callable[..., Run], data_dir: Path
) -> None:
    run = new_run(zero__stage=3, schedule__warmup="auto", schedule__warmup_steps=6, optimizer__peak_lr=PEAK)
    assert run.train(2)["exit_code"] == 0
    (chosen,) = run.events("warmup_chosen")
    rate = chosen["initial_lr"]
    assert 0 < rate < PEAK
    rates = [line["train/lr"] for line in run.metrics()]
    assert rates[:2] == pytest.approx([rate + PEAK / 6, min(PEAK, rate + 2 * PEAK / 6)])
    config = RunConfig.model_validate_json(run.dir.config.read_text())
    assert loss_after(config, data_dir, rate) <= loss_after(config, data_dir, 0.0)
    assert loss_after(config, data_dir, rate * 2 ** (1 / 16) * 1.01) > loss_after(config, data_dir, 0.0)

    losses = run.losses()
    shutil.rmtree(run.dir.checkpoints / "step-00000008")
    assert run.train(1)["exit_code"] == 0
    assert len(run.events("warmup_chosen")) == 1
    assert [line["train/lr"] for line in run.metrics()] == rates
    assert run.losses() == pytest.approx(losses, rel=1e-4)


def test_update_that_fp16_skips_does_not_count_as_stable(new_run: Callable[..., Run]) -> None:
    short = {"schedule__total_steps": 1, "schedule__warmup_steps": 1, "optimizer__peak_lr": PEAK}
    run = new_run(precision="fp16", model__z_loss=300.0, schedule__warmup="auto", **short)
    assert run.train(1)["exit_code"] == 0
    assert [event["step"] for event in run.events("update_skipped")] == [
        1
    ]  # the initial loss scale is too large
    (chosen,) = run.events("warmup_chosen")
    assert 0 < chosen["initial_lr"] < PEAK


def loss_after(run: RunConfig, data_dir: Path, lr: float) -> float:
    """The loss on the first batch after one update with rate `lr`, computed by torch alone."""
    model = GPT(run.model)
    model.initialize(run.seed)
    model.place(CPU, torch.float32)
    reader = BatchReader(
        [(data_dir, 1.0)], context=run.model.context, global_batch=run.batch_sizes, seed=run.seed
    )
    batch = reader.batch(1, rank=0, world_size=1)
    (model(*model_inputs(batch, CPU)) / int(batch.scored.sum())).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)
    PlainOptimizer(run, model).step(lr)
    with torch.no_grad():
        return float(model(*model_inputs(batch, CPU)))
