"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from gpt.config.optimizer import ScheduleConfig


def learning_rate(
    schedule: ScheduleConfig, peak_lr: float, total_steps: int, step: int, initial_lr: float = 0.0
) -> float:
    """The rate of optimizer step `step` (1 is the first, `total_steps` the last).

    Linear warmup lets the run leave the sharp region at initialisation for flatter ones before the peak
    (Kalra & Barkeshli 2024, arXiv:2406.09405). It climbs from `initial_lr` by peak / `warmup_steps` a step,
    so a higher `initial_lr` shortens it. The schedule's own shape follows.
    """
    warmup = schedule.warmup_steps
    if warmup and initial_lr + peak_lr * step / warmup < peak_lr:
        return initial_lr + peak_lr * step / warmup
    ended = math.ceil(warmup * max(0.0, 1 - initial_lr / peak_lr))
    return peak_lr * _SHAPES[schedule.name](schedule, step - ended, total_steps - ended)


def _constant(schedule: ScheduleConfig, step: int, steps: int) -> float:  # noqa: ARG001
    return 1.0


def _cosine(schedule: ScheduleConfig, step: int, steps: int) -> float:
    # SGDR (Loshchilov & Hutter 2017, arXiv:1608.03983), equation 5
    return _towards(schedule, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def _linear(schedule: ScheduleConfig, step: int, steps: int) -> float:
    return _towards(schedule, 1 - step / max(1, steps))


def _inverse_sqrt(schedule: ScheduleConfig, step: int, steps: int) -> float:  # noqa: ARG001
    # Vaswani et al. 2017, arXiv:1706.03762, equation 3, where the peak is (d_model · warmup_steps)^-0.5
    return math.sqrt(schedule.warmup_steps / (schedule.warmup_steps + step))


def _wsd(schedule: ScheduleConfig, step: int, steps: int) -> float:
    # Warmup, stable, decay (MiniCPM, arXiv:2404.06395, section 4). The decay follows Hägele et al. 2024
    # (arXiv:2405.18392, equation 1): 1 - √t did best there, and a line nearly as well.
    progress = (step - (steps - schedule.decay_steps)) / max(1, schedule.decay_steps)
    if progress <= 0:
        return 1.0
    return _towards(schedule, 1 - (math.sqrt(progress) if schedule.decay == "sqrt" else progress))


def _towards(schedule: ScheduleConfig, remaining: float) -> float:
    return schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * remaining


_SHAPES: dict[str, Callable[[ScheduleConfig, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}
