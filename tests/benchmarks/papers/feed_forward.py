"""The eight feed-forward layers of GLU Variants Improve Transformer (Shazeer 2020, arXiv:2002.05202).

python -m tests.benchmarks.papers.feed_forward

All have equally many parameters: gated layers have three matrices of 2/3 of the width (section 2 there).
"""

import tempfile
from pathlib import Path
from statistics import mean, stdev

from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt.config.parameter_table import parameter_count
from tests.benchmarks.papers.small import CONTEXT, VOCABULARY, train
from tests.distributed.data import small_data_set

STEPS, WARMUP, PEAK = 240, 40, 8e-3
SEEDS = (1, 2, 3)
WIDTH = 96  # 4 · 96 and 2/3 of it are both integers
VARIANTS = ("relu", "gelu", "swish", "glu", "bilinear", "geglu", "swiglu", "reglu")


def main() -> None:
    """Train every variant and print a table."""
    print(f"{'feed-forward':<14}{'parameters':>12}{'val. loss':>11}{'± seeds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        data = small_data_set(Path(folder) / "kjv")
        for name in VARIANTS:
            d_ff = 4 * WIDTH if name in ("relu", "gelu", "swish") else 8 * WIDTH // 3
            fields = {"n_layers": 2, "d_model": WIDTH, "n_heads": 4, "ffn": name, "d_ff": d_ff}
            model = ModelConfig.model_validate({"context": CONTEXT, "vocab_size": VOCABULARY, **fields})
            losses = [
                train(
                    data,
                    fields,
                    OptimizerConfig(peak_lr=PEAK),
                    ScheduleConfig(name="cosine", warmup_steps=WARMUP, total_steps=STEPS),
                    seed=seed,
                )
                for seed in SEEDS
            ]
            print(
                f"{name:<14}{parameter_count(model):>12,}{mean(losses):>11.3f}{stdev(losses):>9.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
