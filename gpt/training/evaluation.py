"""The loss on the validation split: a fixed set, sharded over the ranks, exact whatever the split."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.sampling.evaluation import EvaluationReader
from gpt.config.data import DataConfig
from gpt.distributed.world import PendingTick, Tick, World, total
from gpt.model.gpt import GPT
from gpt.run.heartbeat import Heartbeat
from gpt.run.stop import StopFlag
from gpt.training.step import model_inputs


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
    def measure(
        self, model: GPT, world: World, heartbeat: Heartbeat, step: int, stop: StopFlag | None
    ) -> dict[str, float] | None:
        """val/loss (nats a token), val/perplexity and val/bits_per_byte. Collective.

        Of a mixture they are the means by its weights, and val/SOURCE/loss and …/bits_per_byte those of
        each source. None as soon as any rank's `stop` is requested; without one it goes to the end.
        """
        asked = _Asked(world, heartbeat, step, stop)
        model.eval()
        found = [self._measure(windows, model, world, asked) for windows in self._windows]
        model.train()
        if asked.has_stopped:
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
        self, windows: EvaluationReader, model: GPT, world: World, asked: "_Asked"
    ) -> tuple[float, float]:
        """Nats a token and bits a byte over `windows`, 0 without any; useless once a stop was `asked` for."""
        nats, scored, scored_bytes = 0.0, 0, 0
        for start in range(0, len(windows), world.data_size * self._micro_batch):
            if asked.is_to_stop():
                return math.nan, math.nan
            # Every rank computes in every round, at last on padding: stage 3 gathers weights in forward.
            batch = windows.windows(start + world.data_rank * self._micro_batch, self._micro_batch)
            nats += float(model(*model_inputs(batch, world.device)))
            if world.sequence.rank > 0:
                continue
            scored += int(batch.scored.sum())
            scored_bytes += int(self._token_bytes[batch.tokens[:, 1:][batch.scored]].sum())
        nats, scored_total, bytes_total = total(world, nats, float(scored), float(scored_bytes))
        return nats / max(1.0, scored_total), nats / math.log(2) / max(1.0, bytes_total)


class _Asked:
    """Whether a rank was asked to stop, known to all a round later, so that no round waits for the answer."""

    def __init__(self, world: World, heartbeat: Heartbeat, step: int, stop: StopFlag | None) -> None:
        self._world, self._heartbeat, self._step, self._stop = world, heartbeat, step, stop
        self._pending: PendingTick | None = None
        self.has_stopped = False

    def is_to_stop(self) -> bool:
        """A round begins: whether it, and all that follow, should not."""
        self._heartbeat.beat(self._step, "evaluation")
        if self._stop is not None and not self.has_stopped:
            self.has_stopped = self._pending is not None and self._pending.result().stop > 0
            self._pending = PendingTick(self._world, Tick(stop=float(self._stop.is_requested())))
        return self.has_stopped


def source_names(data: DataConfig) -> Sequence[str]:
    """A name for each source in the metrics: its number and its folder."""
    return [f"{number}-{source.path.name}" for number, source in enumerate(data.sources)]
