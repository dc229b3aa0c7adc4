"""The loss on the validation split: the same tokens every time, and the same result for every world size."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.sampling.evaluation import EvaluationReader
from gpt.config.data import DataConfig
from gpt.distributed.reduction import PendingReduction
from gpt.distributed.world import World, total
from gpt.model.gpt import GPT
from gpt.run.heartbeat import Heartbeat
from gpt.run.stop import StopFlag
from gpt.training.metrics import REDUCTIONS
from gpt.training.step import model_inputs


class Validation:
    """The first tokens of the validation split of every source of a mixture."""

    def __init__(
        self, data: DataConfig, context: int, tokens: int, micro_batch: int, token_bytes: NDArray[np.int64]
    ) -> None:
        """Raises DataError when a source has no validation split."""
        self._names = source_names(data)
        weights = [source.weight for source in data.sources]
        self._shares = [weight / sum(weights) for weight in weights]
        self._windows = [
            EvaluationReader(source.path, context=context, tokens=tokens, document_mask=data.document_mask)
            for source in data.sources
        ]
        self._micro_batch, self._token_bytes = micro_batch, token_bytes

    @torch.no_grad()
    def measure(
        self, model: GPT, world: World, heartbeat: Heartbeat, step: int, stop: StopFlag | None
    ) -> dict[str, float] | None:
        """val/loss (nats a token), val/perplexity and val/bits_per_byte. Collective.

        For a mixture these are the means over its sources, weighted as the mixture is, and every source adds
        val/SOURCE/loss and val/SOURCE/bits_per_byte. Returns None as soon as `stop` is requested on any rank;
        when `stop` is None the evaluation always completes.
        """
        watch = _StopWatch(world, heartbeat, step, stop)
        model.eval()
        found = [self._measure(windows, model, world, watch) for windows in self._windows]
        model.train()
        if watch.is_stopping:
            return None
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

    def _measure(
        self, windows: EvaluationReader, model: GPT, world: World, watch: "_StopWatch"
    ) -> tuple[float, float]:
        """Nats a token and bits a byte over `windows`; 0 without a scored token, NaN after a stop request."""
        nats, scored, scored_bytes = 0.0, 0, 0
        for start in range(0, len(windows), world.data_size * self._micro_batch):
            if watch.begin_round():
                return math.nan, math.nan
            # Every rank computes in every round, on padding at the end: at stage 3 forward is collective.
            batch = windows.windows(start + world.data_rank * self._micro_batch, self._micro_batch)
            nats += float(model(*model_inputs(batch, world.device)))
            if not world.is_counting:
                continue
            scored += int(batch.scored.sum())
            scored_bytes += int(self._token_bytes[batch.tokens[:, 1:][batch.scored]].sum())
        nats, scored_total, bytes_total = total(world, nats, float(scored), float(scored_bytes))
        return nats / max(1.0, scored_total), nats / math.log(2) / max(1.0, bytes_total)


class _StopWatch:
    """Tells all ranks in the same round that one of them was asked to stop.

    The answer of one round is read at the next, so that no round waits for it.
    """

    def __init__(self, world: World, heartbeat: Heartbeat, step: int, stop: StopFlag | None) -> None:
        self._world, self._heartbeat, self._step, self._stop = world, heartbeat, step, stop
        self._pending: PendingReduction | None = None
        self.is_stopping = False

    def begin_round(self) -> bool:
        """Begin a round; returns whether the evaluation ends here instead."""
        self._heartbeat.beat(self._step, "evaluation")
        if self._stop is not None and not self.is_stopping:
            self.is_stopping = self._pending is not None and self._pending.result()["stop"] > 0
            asked = {"stop": float(self._stop.is_requested())}
            self._pending = PendingReduction(self._world, asked, REDUCTIONS)
        return self.is_stopping


def source_names(data: DataConfig) -> Sequence[str]:
    """The name of each source in the metrics: its number and its folder."""
    return [f"{number}-{source.path.name}" for number, source in enumerate(data.sources)]
