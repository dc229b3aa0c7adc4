"""Learning rate schedules, against torch's schedulers and the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler

from gpt.config.optimizer import ScheduleConfig
from gpt.optimizer.lr_schedule import learning_rate

PEAK, TOTAL = 3e-3, 100


def rates(initial_lr: float = 0.0, **fields: Any) -> list[float]:
    schedule = ScheduleConfig.model_validate({"total_steps": TOTAL, **fields})
    return [learning_rate(schedule, PEAK, TOTAL, step, initial_lr) for step in range(1, TOTAL + 1)]


def torch_rates(*phases: tuple[int, Any]) -> list[float]:
    """The rates of torch's schedulers after 1, 2, … calls of step(); each phase starts at its step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedulers = [build(optimizer) for _, build in phases]
    chain = lr_scheduler.SequentialLR(optimizer, schedulers, [start for start, _ in phases[1:]])
    found = []
    for _ in range(TOTAL):
        optimizer.step()
        chain.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def warmup(steps: int) -> Any:
    # torch refuses to start at 0; from step 1 on the factor of step n is n / steps anyway.
    return lambda o: lr_scheduler.LinearLR(o, start_factor=1e-12, total_iters=steps)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_torchs(name: str) -> None:
    after = TOTAL - 20
    shapes: dict[str, Any] = {
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, after, eta_min=0.1 * PEAK),
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=after),
        "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    }
    expected = torch_rates((0, warmup(20)), (20, shapes[name]))
    assert rates(name=name, warmup_steps=20) == pytest.approx(expected, rel=1e-9)


def test_inverse_square_root_is_equation_3_of_vaswani() -> None:
    d_model, warmup_steps = 512, 25
    schedule = ScheduleConfig(name="inverse_sqrt", warmup_steps=warmup_steps, total_steps=TOTAL)
    peak = (d_model * warmup_steps) ** -0.5
    for step in range(1, TOTAL + 1):
        expected = d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)
        assert learning_rate(schedule, peak, TOTAL, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["sqrt", "linear"])
def test_wsd_stays_at_the_peak_and_decays_at_the_end(decay: str) -> None:
    found = rates(name="wsd", warmup_steps=10, decay_steps=20, decay=decay, final_lr_fraction=0.0)
    assert found[9:80] == [PEAK] * 71  # steps 10 to 80
    fall = [PEAK * (1 - (math.sqrt(n / 20) if decay == "sqrt" else n / 20)) for n in range(1, 21)]
    assert found[80:] == pytest.approx(fall, abs=1e-15)


def test_wsd_decay_can_start_from_a_checkpoint_of_a_longer_run() -> None:
    """`launch --from RUN@60` needs the same rates in both runs up to step 60."""
    stable = rates(name="wsd", warmup_steps=10)
    branch = ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=15, total_steps=75)
    branched = [learning_rate(branch, PEAK, 75, step) for step in range(1, 76)]
    assert branched[:60] == stable[:60]
    assert branched[60] < PEAK and branched[-1] == pytest.approx(0.1 * PEAK)


def test_warmup_from_a_higher_initial_rate_is_shorter() -> None:
    whole = rates(name="constant", warmup_steps=40)
    saved = rates(name="constant", warmup_steps=40, initial_lr=0.25 * PEAK)
    assert saved[:30] == pytest.approx(whole[10:40])  # T·η_init/η_peak = 10 steps fewer
    assert rates(name="cosine", warmup_steps=40, initial_lr=PEAK)[0] < PEAK  # none is left
    assert saved[-1] == PEAK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "inverse_sqrt"}, "needs schedule.warmup_steps"),
        (
            {"name": "cosine", "decay_steps": 5},
            "decay_steps = 5 has no effect with schedule.name = 'cosine'",
        ),
    ],
)
def test_meaningless_schedules_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig.model_validate({"total_steps": TOTAL, **fields})
