"""One optimizer step."""

import torch
from torch import Tensor

from data_pipeline.sampling.batch import Batch
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents
from gpt.model.loss import IGNORED

ModelInputs = tuple[Tensor, Tensor, Documents]


def train_step(
    engine: Engine, micro_batches: list[ModelInputs], lr: float, scored_tokens: float
) -> dict[str, Tensor]:
    """Train on this rank's `micro_batches`, update with rate `lr` and return the step's numbers by name.

    `train/loss` is the sum over this rank's tokens, in nats. The gradient is that of the mean over
    `scored_tokens`, the count over all ranks and micro-batches; it therefore does not depend on how the batch
    is split, or on how unequally its documents fall on the ranks.
    """
    losses = []
    numbers: dict[str, Tensor] = {}
    for index, inputs in enumerate(micro_batches, start=1):
        is_last = index == len(micro_batches)
        losses.append(engine.forward_backward(1.0 / scored_tokens, *inputs, is_last=is_last))
        numbers = engine.step(lr)
    return {"train/loss": torch.stack(losses).sum(), **numbers}


def model_inputs(batch: Batch, device: torch.device | str = "cpu") -> ModelInputs:
    """Ids [B, T], targets [B, T] with IGNORED where they are not scored, and documents, on `device`."""
    tokens = torch.from_numpy(batch.tokens)
    targets = tokens[:, 1:].masked_fill(torch.from_numpy(~batch.scored), IGNORED)
    return (
        tokens[:, :-1].to(device, non_blocking=True),
        targets.to(device, non_blocking=True),
        Documents.from_ends(batch.document_ends, device),
    )
