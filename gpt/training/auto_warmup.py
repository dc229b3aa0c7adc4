"""`schedule.warmup = "auto"`: where the warmup starts, by the instability of the first update.

Kalra & Barkeshli 2024 (arXiv:2406.09405) start the warmup at the critical rate η_c of the
initial network, above which the first update raises the loss (the loss catapult), instead of at zero. Up to
there small rates only lose time: T_warmup · η_c / η_peak steps are saved. They find η_c by doubling and
bisecting the rate, which is done here with the run's own optimizer, first batch and ZeRO stage.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpt.distributed.world import World, total
from gpt.distributed.zero.engine import Engine
from gpt.model.gpt import GPT, seed_dropout
from gpt.training.step import ModelInputs, train_step

_DOUBLINGS = 10  # the search begins at peak / 2^10
_BISECTIONS = 4  # after them the rate is known to 2^(1/16), 4%
# An update that is left out says nothing of its rate; fp16's loss scale begins at 2^16 and falls with each.
_MOST_SCALES = 20


def critical_rate(loss_after: Callable[[float], float], loss_before: float, peak_lr: float) -> float:
    """The largest rate found up to `peak_lr` at which one update does not raise the loss.

    0 where even the smallest one does: then the warmup starts as always.
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


def initial_rate(
    engine: Engine, model: GPT, micro_batches: list[ModelInputs], scored_tokens: float, world: World
) -> float:
    """Where the warmup of this run starts; the state is left as it was. Collective."""
    run = engine.run

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            sums: list[Tensor] = [model(*inputs) for inputs in micro_batches]
        model.train()
        (summed,) = total(world, float(torch.stack(sums).sum()))
        return summed / scored_tokens

    def loss_after(lr: float) -> float:
        with engine.undone():
            for _ in range(_MOST_SCALES):
                seed_dropout(run.seed, 1, world.rank)
                train_step(engine, micro_batches, lr, scored_tokens)
                if not engine.was_skipped:
                    return loss()
            return math.inf

    return critical_rate(loss_after, loss(), run.optimizer.peak_lr)
