"""The loss on the validation split: a fixed set, sharded over the ranks, exact whatever the split."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.batches import EvaluationReader
from gpt.config import DataConfig
from gpt.distributed import World, total
from gpt.model import GPT
from gpt.step import model_inputs


class Validation:
    """The beginning of the validation split of every source of a mixture."""

    def __init__(
        self, data: DataConfig, context: int, tokens: int, micro_batch: int, token_bytes: NDArray[np.int64]
    ) -> None:
        """Raises DataError where a source has no validation split."""
        self._names = source_names(data)
        weights = [source.weight for source in data.sources]
        self._shares = [weight / sum(weights) for weight in weights]
        self._windows = [
            EvaluationReader(source.path, context=context, tokens=tokens, document_mask=data.document_mask)
            for source in data.sources
        ]
        self._micro_batch, self._token_bytes = micro_batch, token_bytes

    @torch.no_grad()
    def measure(self, model: GPT, world: World) -> dict[str, float]:
        """val/loss (nats a token), val/perplexity and val/bits_per_byte. Collective.

        Of a mixture they are the means by its weights, and val/SOURCE/loss and …/bits_per_byte those of
        each source.
        """
        model.eval()
        found = [self._measure(windows, model, world) for windows in self._windows]
        model.train()
        loss = sum(share * loss for share, (loss, _) in zip(self._shares, found, strict=True))
        bits = sum(share * bits for share, (_, bits) in zip(self._shares, found, strict=True))
        metrics = {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bits_per_byte": bits,
        }
        if len(found) > 1:
            for name, (loss, bits) in zip(self._names, found, strict=True):
                metrics |= {f"val/{name}/loss": loss, f"val/{name}/bits_per_byte": bits}
        return metrics

    def _measure(self, windows: EvaluationReader, model: GPT, world: World) -> tuple[float, float]:
        """Nats a token and bits a byte over all of `windows`."""
        nats, scored, scored_bytes = 0.0, 0, 0
        for start in range(0, len(windows), world.data_size * self._micro_batch):
            # Every rank computes in every round, at last on padding: stage 3 gathers weights in forward.
            batch = windows.windows(start + world.data_rank * self._micro_batch, self._micro_batch)
            nats += float(model(*model_inputs(batch, world.device)))
            if world.sequence.rank > 0:
                continue
            scored += int(batch.scored.sum())
            scored_bytes += int(self._token_bytes[batch.tokens[:, 1:][batch.scored]].sum())
        nats, scored_total, bytes_total = total(world, nats, float(scored), float(scored_bytes))
        return nats / scored_total, nats / math.log(2) / bytes_total


def source_names(data: DataConfig) -> Sequence[str]:
    """A name for each source in the metrics: its number and its folder."""
    return [f"{number}-{source.path.name}" for number, source in enumerate(data.sources)]
