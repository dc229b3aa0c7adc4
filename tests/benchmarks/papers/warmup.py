"""Loss against peak rate without warmup, with warmup, and with GI-Adam (arXiv:2406.09405, figures 2 and 9).

python -m tests.benchmarks.papers.warmup OUT.svg
"""

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from tests.benchmarks.papers.small import DIVERGED, train
from tests.distributed.data import small_data_set

STEPS, WARMUP = 120, 30
BETA2 = 0.999  # as in the paper's experiments
PEAKS = [3e-3 * 2**n for n in range(6)]
MODEL = {"n_layers": 2, "d_model": 64, "n_heads": 4}


def uncorrected(step: int) -> float:
    """The factor by which steps of GI-Adam grow without the second moment's bias correction."""
    return 1 / math.sqrt(1 - BETA2**step)


WAYS: dict[str, tuple[str, int, Callable[[int], float]]] = {
    "no warmup": ("zero", 0, lambda _: 1.0),
    f"linear warmup, {WARMUP} steps": ("zero", WARMUP, lambda _: 1.0),
    "GI-Adam": ("gradient", 0, lambda _: 1.0),
    "GI-Adam without bias correction": ("gradient", 0, uncorrected),
}


def main(out: Path) -> None:
    """Train all, print a table and draw a plot."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with tempfile.TemporaryDirectory() as folder:
        data = small_data_set(Path(folder) / "kjv")
        losses = {
            name: [
                train(
                    data,
                    MODEL,
                    OptimizerConfig(peak_lr=peak, betas=(0.9, BETA2), second_moment_init=init),
                    ScheduleConfig(name="cosine", warmup_steps=warmup, total_steps=STEPS),
                    factor=factor,
                )
                for peak in PEAKS
            ]
            for name, (init, warmup, factor) in WAYS.items()
        }
    print(f"{'peak rate':<34}" + "".join(f"{peak:>8.3f}" for peak in PEAKS))
    for name, row in losses.items():
        print(f"{name:<34}" + "".join(f"{loss:>8.3f}" if loss < DIVERGED else "diverged" for loss in row))
        pyplot.plot(PEAKS, [loss if loss < DIVERGED else math.nan for loss in row], marker="o", label=name)
    pyplot.xscale("log")
    pyplot.xlabel("peak learning rate")
    pyplot.ylabel(f"validation loss after {STEPS} steps, nats a token")
    pyplot.legend()
    pyplot.savefig(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
