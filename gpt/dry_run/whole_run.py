"""A dry step of a network of any depth, in bounded time.

Every block does the same, so a deep network is run at two depths, and a line through them gives the numbers
at its own depth.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from gpt.config.run import RunConfig
from gpt.dry_run.step import HOPPER, dry_step
from gpt.run.dry_step import Collective, DryStep

# Stage 3 keeps up to 10^9 weights gathered for reuse, so the first depth must hold more of them twice.
DEPTHS = (16, 24)


def dry_step_of(
    run: RunConfig, world_size: int, local_size: int, capability: tuple[int, int] = HOPPER
) -> DryStep:
    """The dry step of the resolved `run` on rank 0 of `world_size`, `local_size` of them on each node."""
    layers = run.model.n_layers
    if layers <= DEPTHS[1]:
        return dry_step(run, world_size, local_size, capability)
    models = (run.model.model_copy(update={"n_layers": depth}) for depth in DEPTHS)
    shallow, deep = (
        dry_step(run.with_tables(model=model), world_size, local_size, capability) for model in models
    )
    return at_depth(layers, shallow, deep)


def at_depth(layers: int, shallow: DryStep, deep: DryStep) -> DryStep:
    """The step at `layers`, on the lines through the steps at the two DEPTHS."""
    names = ("weights", "optimizer", "kept", "activations", "peak", "kernels")
    numbers = {name: _line(layers, getattr(shallow, name), getattr(deep, name)) for name in names}
    waits = {(wait.line, wait.reason): wait.count for wait in shallow.host_waits}
    return replace(
        deep,
        **numbers,
        depths=DEPTHS,
        collectives=_collectives_at(layers, shallow.collectives, deep.collectives),
        host_waits=tuple(
            replace(wait, count=_line(layers, waits.get((wait.line, wait.reason), 0), wait.count))
            for wait in deep.host_waits
        ),
    )


def _line(layers: int, shallow: float, deep: float) -> int:
    return max(0, round(deep + (deep - shallow) / (DEPTHS[1] - DEPTHS[0]) * (layers - DEPTHS[1])))


def _collectives_at(
    layers: int, shallow: Iterable[Collective], deep: Iterable[Collective]
) -> tuple[Collective, ...]:
    """Collectives whose size does not depend on the depth are counted; of the others, the bytes grow."""
    before = {(c.operation, c.ranks, c.bytes): c.count for c in shallow}
    now = {(c.operation, c.ranks, c.bytes): c.count for c in deep}
    found = []
    totals: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for key in before.keys() | now.keys():
        if key in before and key in now:
            continue
        total = totals[key[:2]]
        for at, count in ((0, before.get(key, 0)), (2, now.get(key, 0))):
            total[at] += count
            total[at + 1] += count * key[2]
    for key, count in now.items():
        if key in before:
            found.append(Collective(*key, _line(layers, before[key], count)))
        elif key[:2] in totals:
            few, few_bytes, many, many_bytes = totals.pop(key[:2])
            count = max(1, _line(layers, few, many))
            found.append(Collective(*key[:2], _line(layers, few_bytes, many_bytes) // count, count))
    return tuple(found)
