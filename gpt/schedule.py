"""The learning rate as a pure function of the step."""

import math

from gpt.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak_lr: float, total_steps: int, step: int) -> float:
    """The rate of optimizer step `step` (1 is the first, `total_steps` the last).

    Linear warmup, which lets the run pass from the sharp region at initialisation to flat ones before
    the peak (Kalra & Barkeshli 2024, arXiv:2406.09405, section 4), reaches the peak at step
    `warmup_steps`; then a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5) or a line to
    `final_lr_fraction` of the peak at the last step, or the peak throughout.
    """
    if step <= schedule.warmup_steps:
        return peak_lr * step / schedule.warmup_steps
    if schedule.name == "constant":
        return peak_lr
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak_lr * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * remaining)
