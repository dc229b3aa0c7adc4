"""Training of a network so small that many can be trained, by one process without DeepSpeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.sampling.batch_schedule import BatchSizes
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.evaluation import EvaluationReader
from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt.model.gpt import GPT
from gpt.optimizer.build import build_optimizer
from gpt.optimizer.lr_schedule import learning_rate
from gpt.training.step import model_inputs

CPU = torch.device("cpu")
CONTEXT, SEQUENCES, VOCABULARY = 64, 16, 4096
DIVERGED = 20.0  # nats, more than twice the loss of a uniform guess


def train(
    data: Path,
    model_fields: dict[str, Any],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    *,
    seed: int = 1,
    factor: Callable[[int], float] = lambda _: 1.0,
) -> float:
    """Validation loss, in nats per token, after `schedule.total_steps`, or DIVERGED.

    `factor` of the step multiplies its learning rate.
    """
    torch.manual_seed(seed)
    model = GPT(ModelConfig.model_validate({"context": CONTEXT, "vocab_size": VOCABULARY, **model_fields}))
    model.initialize(seed)
    model.place(CPU, torch.float32)
    built = build_optimizer(model, optimizer, torch.float32)
    reader = BatchReader([(data, 1.0)], context=CONTEXT, global_batch=BatchSizes(SEQUENCES), seed=seed)
    steps = schedule.total_steps
    assert steps is not None
    for step in range(1, steps + 1):
        batch = reader.batch(step, rank=0, world_size=1)
        loss = model(*model_inputs(batch, CPU)) / int(batch.scored.sum())
        if not loss.item() < DIVERGED:  # also true of NaN
            return DIVERGED
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.grad_clip)
        for group in built.param_groups:
            group["lr"] = learning_rate(schedule, optimizer.peak_lr, steps, step) * factor(step)
        built.step()
    return min(DIVERGED, validation_loss(model, data))


@torch.no_grad()
def validation_loss(model: GPT, data: Path) -> float:
    """Nats per token on the first tokens of the validation split."""
    windows = EvaluationReader(data, context=CONTEXT, tokens=16_384, document_mask=True)
    nats, scored = 0.0, 0
    for start in range(0, len(windows), SEQUENCES):
        batch = windows.windows(start, SEQUENCES)
        nats += float(model(*model_inputs(batch, CPU)))
        scored += int(batch.scored.sum())
    return nats / scored
