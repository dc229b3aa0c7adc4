"""Compares the two runs of a rehearsal: the undisturbed one, and the one that was killed and resized."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt.run import record
from gpt.run.events import Event, read_events
from gpt.run.run_dir import RunDir
from launcher.commands.fault_injector import FaultInjector
from launcher.request import Request
from launcher.units import processes

# The largest allowed difference between the losses of a step on two numbers of processes, which add in
# different orders.
# fp32: measured 3e-7 relative after a few steps. bf16 rounds by 2^-8 = 4e-3 relative: 2e-2 is five roundings.
# fp16 rounds by 2^-11, eight times finer: five roundings are 2.5e-3 (measured: 3e-6 after four steps).
LOSS_TOLERANCE = {"fp32": 1e-3, "fp16": 2.5e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One requirement, and what the rehearsal measured."""

    name: str
    is_good: bool
    seen: str


def compare(undisturbed: RunDir, disturbed: RunDir, request: Request, fault: FaultInjector) -> list[Check]:
    """Compare the records of the two runs."""
    first, second = (
        {line["step"]: line for line in record.read_steps(run.metrics)} for run in (undisturbed, disturbed)
    )
    steps = sorted(first)
    worlds = [event["world_size"] for event in read_events(disturbed.events, Event.ATTEMPT_STARTED)]
    resized_at = steps[-1]
    if worlds[-1] != worlds[0]:
        *_, resumed = read_events(disturbed.events, Event.RESUMED)
        resized_at = int(resumed["step"])
    before = [step for step in steps if step <= resized_at]
    after = [step for step in steps if step > resized_at]
    checks = [
        Check(
            "killed, then resumed from a checkpoint without help",
            fault.resumed_step is not None,
            f"killed after step {fault.killed_step}, resumed from step {fault.resumed_step}",
        ),
        Check("every step recorded once", sorted(second) == steps, f"{len(second)} of {len(steps)} steps"),
        _equal("same sequences at every step", first, second, steps, "data/digest"),
        _equal(f"losses equal bit for bit up to step {resized_at}", first, second, before, "train/loss"),
    ]
    if after:
        tolerance = LOSS_TOLERANCE[request.config.precision]
        name = f"losses equal within {tolerance:g} on {processes(worlds[-1])}"
        skipped = _skipped_by_one(undisturbed, disturbed, after)
        checks.append(_close(name, first, second, after, tolerance, skipped))
    return checks


def _skipped_by_one(undisturbed: RunDir, disturbed: RunDir, steps: Sequence[int]) -> int | None:
    """The first of `steps` at which only one of the two runs skipped its update, if there is one.

    In fp16 a gradient may overflow on one number of processes only. From the next step on, one run is an
    update ahead of the other, and their losses cannot be compared.
    """
    skips = [
        {int(event["step"]) for event in read_events(run.events, Event.UPDATE_SKIPPED)}
        for run in (undisturbed, disturbed)
    ]
    return next((step for step in steps if (step in skips[0]) != (step in skips[1])), None)


def _close(
    name: str,
    first: dict[int, Any],
    second: dict[int, Any],
    steps: Sequence[int],
    tolerance: float,
    skipped: int | None,
) -> Check:
    """Whether the losses agree within `tolerance`, up to the step `skipped` if there is one."""
    compared = [step for step in steps if step in second and (skipped is None or step <= skipped)]
    losses = ((first[step].get("train/loss"), second[step].get("train/loss")) for step in compared)
    off = max((_distance(*pair) for pair in losses), default=0.0)
    seen = f"largest difference {off:.2g}, steps {steps[0]}–{compared[-1] if compared else steps[0]}"
    if skipped is not None:
        seen += f"; only one run skipped the update of step {skipped}"
    return Check(name, off <= tolerance, seen)


def _distance(first: float | None, second: float | None) -> float:
    """How far two losses are apart; None, which is not finite, is infinitely far from every number."""
    if first is None or second is None:
        return 0.0 if first == second else float("inf")
    return abs(first - second)


def _equal(
    name: str, first: dict[int, Any], second: dict[int, Any], steps: Sequence[int], metric: str
) -> Check:
    wrong = [step for step in steps if first[step].get(metric) != second.get(step, {}).get(metric)]
    return Check(name, not wrong, f"{len(steps)} steps" if not wrong else f"differ at step {wrong[0]}")
