"""Which checkpoints are kept: a pure function of their steps, pins and validation losses."""

from collections.abc import Collection, Mapping, Sequence

from gpt.checkpoint.doubt import Doubt
from gpt.config.run import CheckpointConfig


def kept(
    steps: Sequence[int],
    config: CheckpointConfig,
    pinned: Collection[int] = (),
    val_losses: Mapping[int, float] | None = None,
    doubt: Doubt | None = None,
) -> set[int]:
    """The steps whose checkpoints are kept: the newest, the pinned, one per `keep_every` steps, and the best.

    `val_losses` holds the validation loss of each step that has one. With a `doubt` about the newest ones,
    the last good checkpoint is kept too.
    """
    ordered = sorted(steps)
    keep = {*ordered[-config.keep_last :], *(step for step in ordered if step in pinned)}
    if doubt is not None:
        keep |= doubt.must_keep(ordered)
    if config.keep_every is not None:
        first_of_each = {step // config.keep_every: step for step in reversed(ordered)}
        keep |= {step for multiple, step in first_of_each.items() if multiple > 0}
    if config.keep_best:
        scored = [(loss, step) for step in ordered if (loss := (val_losses or {}).get(step)) is not None]
        keep |= {step for _, step in sorted(scored)[: config.keep_best]}
    return keep
