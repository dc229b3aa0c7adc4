"""`schedule.warmup = "auto"`: finds the learning rate at which the warmup starts.

Kalra & Barkeshli 2024 (arXiv:2406.09405) start the warmup at the critical rate η_c of the initial network
instead of at zero. Above η_c the first update raises the loss (the loss catapult); below it, small rates only
lose time, so that T_warmup · η_c / η_peak steps are saved. They find η_c by doubling and bisecting the rate.
The search here does so with the run's own optimizer, first batch and ZeRO stage.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpt.distributed.world import total
from gpt.distributed.zero.engine import Engine
from gpt.model.gpt import seed_dropout
from gpt.training.step import ModelInputs, train_step

_DOUBLINGS = 10  # the search begins at peak / 2^10
_BISECTIONS = 4  # afterwards the rate is known to a factor of 2^(1/16), 4%
# A skipped update says nothing about its rate. fp16's loss scale starts at 2^16 and falls with each of them.
_MAX_SKIPPED = 20


def critical_rate(loss_after: Callable[[float], float], loss_before: float, peak_lr: float) -> float:
    """The largest rate up to `peak_lr` at which one update does not raise the loss, as far as searched.

    0 when even the smallest rate raises it: then the warmup starts at zero as usual.
    """
    low, high = 0.0, peak_lr * 2.0**-_DOUBLINGS
    while _is_stable(loss_after(high), loss_before):
        low, high = high, 2 * high
        if low >= peak_lr:
            return peak_lr
    for _ in range(_BISECTIONS if low else 0):
        middle = math.sqrt(low * high)
        if _is_stable(loss_after(middle), loss_before):
            low = middle
        else:
            high = middle
    return low


def _is_stable(loss_after: float, loss_before: float) -> bool:
    return math.isfinite(loss_after) and loss_after <= loss_before


def initial_rate(engine: Engine, micro_batches: list[ModelInputs], scored_tokens: float) -> float:
    """The rate at which this run's warmup starts. Collective; the state stays as it is."""
    run, model, world = engine.run, engine.model, engine.world

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            sums: list[Tensor] = [model(*inputs) for inputs in micro_batches]
        model.train()
        (summed,) = total(world, float(torch.stack(sums).sum()))
        return summed / scored_tokens

    def loss_after(lr: float) -> float:
        with engine.restored_afterwards():
            for _ in range(_MAX_SKIPPED):
                seed_dropout(run.seed, 1, world.rank)
                train_step(engine, micro_batches, lr, scored_tokens)
                if not engine.was_skipped:
                    return loss()
            return math.inf

    return critical_rate(loss_after, loss(), run.optimizer.peak_lr)
