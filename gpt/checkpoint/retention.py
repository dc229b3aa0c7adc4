"""Which checkpoints stay: a pure function of what is there and how good it was."""

from collections.abc import Collection, Mapping, Sequence

from gpt.config.run import CheckpointConfig


def kept(
    steps: Sequence[int],
    config: CheckpointConfig,
    pinned: Collection[int] = (),
    val_losses: Mapping[int, float] | None = None,
) -> set[int]:
    """Those of the committed `steps` that stay: the newest, the pinned, one of every so many steps, the best.

    `val_losses` are the validation losses by step, where there are some.
    """
    ordered = sorted(steps)
    stay = {*ordered[-config.keep_last :], *(step for step in ordered if step in pinned)}
    if config.keep_every is not None:
        first_of_each = {step // config.keep_every: step for step in reversed(ordered)}
        stay |= {step for multiple, step in first_of_each.items() if multiple > 0}
    if config.keep_best:
        scored = [(loss, step) for step in ordered if (loss := (val_losses or {}).get(step)) is not None]
        stay |= {step for _, step in sorted(scored)[: config.keep_best]}
    return stay
