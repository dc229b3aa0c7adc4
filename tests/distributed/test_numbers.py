"""The numbers of a run against a hand-written loop: any world, any cut of the batch, the same gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batches import BatchReader
from gpt.config import RunConfig
from gpt.flops import flops_per_token
from gpt.model import GPT
from gpt.schedule import learning_rate
from gpt.step import model_inputs
from tests.distributed.conftest import CONTEXT, Run

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[float], list[float]]]:
    return {}


def plain_loop(run: RunConfig, data_dir: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one process that computes each step's whole batch at once."""
    model = GPT(run.model)
    model.initialize(run.seed)
    model.place(CPU, torch.float32)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    width_ratio = run.model.d_model / (run.model.mup_base_width or run.model.d_model)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.ndim != 2], "ratio": 1.0}]
    groups[0]["weight_decay"] = 0.0
    for is_hidden, ratio in ((False, 1.0), (True, width_ratio)):
        members = [p for name, p in matrices.items() if name.startswith("blocks.") == is_hidden]
        groups.append({"params": members, "weight_decay": run.optimizer.weight_decay * ratio, "ratio": ratio})
    adamw = torch.optim.AdamW(groups, betas=run.optimizer.betas, eps=run.optimizer.eps, fused=False)
    reader = BatchReader(
        [(data_dir, 1.0)], context=run.model.context, global_batch=run.batch_sizes, seed=run.seed
    )
    losses, norms = [], []
    for step in range(1, run.total_steps + 1):
        batch = reader.batch(step, rank=0, world_size=1)
        loss = model(*model_inputs(batch, CPU)) / int(batch.scored.sum())
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)))
        for group in adamw.param_groups:
            lr = learning_rate(run.schedule, run.optimizer.peak_lr, run.total_steps, step)
            group["lr"] = lr / group["ratio"]
        adamw.step()
        losses.append(loss.item())
    return losses, norms


# The ramps: sequences of the first steps, before all 8.
@pytest.mark.parametrize(
    ("stage", "processes", "micro_batch", "mup_base_width", "ramp", "is_compiled"),
    [
        (1, 1, 8, None, [], False),
        (1, 2, 1, 8, [2, 2, 6], False),
        (2, 2, 2, None, [4, 4], False),
        (3, 2, 4, 8, [], True),
        (3, 1, 2, None, [2, 6], False),
    ],
)
def test_losses_and_norms_are_those_of_a_plain_loop(
    new_run: Callable[..., Run],
    data_dir: Path,
    stage: int,
    processes: int,
    micro_batch: int,
    mup_base_width: int | None,
    ramp: list[int],
    is_compiled: bool,
) -> None:
    clip = 0.1 if mup_base_width else 0.5  # low enough to clip on the way
    run = new_run(
        zero__stage=stage,
        batch__micro_batch=micro_batch,
        batch__warmup=[{"steps": 1, "global_batch_tokens": size * CONTEXT} for size in ramp],
        schedule__total_steps=STEPS,
        optimizer__grad_clip=clip,
        compile=is_compiled,
        model__initialization="mup" if mup_base_width else "gpt2",
        model__mup_base_width=mup_base_width,
    )
    assert run.train(processes)["exit_code"] == 0
    config = RunConfig.model_validate_json(run.dir.config.read_text())
    losses, norms = plain_loop(config, data_dir)
    np.testing.assert_allclose(run.losses(), losses, rtol=1e-5)
    np.testing.assert_allclose([line["train/grad_norm"] for line in run.metrics()], norms, rtol=1e-4)
    assert max(norms) > clip  # it did clip
    phases = {event["name"]: event["seconds"] for event in run.events("phase")}
    assert (phases.get("compile", 0.0) > 1.0) == is_compiled
    [built] = run.events("network_built")
    assert built["attention"] == "sdpa" and built["peak_flops_per_second"] > 1e8
    for line in run.metrics():
        flops_per_second = flops_per_token(config.model) * line["train/tokens_per_second"]
        assert line["train/mfu"] == pytest.approx(flops_per_second / built["peak_flops_per_second"])
    tokens = [line["tokens"] for line in run.metrics()]
    assert tokens == np.cumsum([*ramp, *[8] * (STEPS - len(ramp))] * np.array(CONTEXT)).tolist()


def test_ranks_have_unequal_counts_of_scored_tokens(data_dir: Path) -> None:
    """What makes the test above worth something: its batches are not evenly scored."""
    reader = BatchReader([(data_dir, 1.0)], context=32, global_batch=8, seed=1234)
    counts = [[int(reader.batch(step, r, 2).scored.sum()) for r in (0, 1)] for step in range(1, STEPS + 1)]
    assert any(first != second for first, second in counts)
