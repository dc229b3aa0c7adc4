"""The loss on the validation split: a fixed set, sharded over the ranks, exact whatever the split."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batches import EvaluationReader
from gpt.distributed import World, total
from gpt.model import GPT
from gpt.step import model_inputs


@torch.no_grad()
def validate(
    model: GPT, windows: EvaluationReader, token_bytes: NDArray[np.int64], micro_batch: int, world: World
) -> dict[str, float]:
    """val/loss (nats a token), val/perplexity and val/bits_per_byte over all of `windows`. Collective."""
    nats, scored, scored_bytes = 0.0, 0, 0
    model.eval()
    for start in range(0, len(windows), world.size * micro_batch):
        # Every rank computes in every round, at last on padding: stage 3 gathers weights in the forward pass.
        batch = windows.windows(start + world.rank * micro_batch, micro_batch)
        nats += float(model(*model_inputs(batch, world.device)))
        scored += int(batch.scored.sum())
        scored_bytes += int(token_bytes[batch.tokens[:, 1:][batch.scored]].sum())
    model.train()
    nats, scored_total, bytes_total = total(world, nats, float(scored), float(scored_bytes))
    loss = nats / scored_total
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bits_per_byte": nats / math.log(2) / bytes_total,
    }
