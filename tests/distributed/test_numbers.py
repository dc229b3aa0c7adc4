"""A run has the numbers of a hand-written loop, for every world size and every split of the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.evaluation import EvaluationReader
from gpt.config.run import RunConfig
from gpt.model.flops import flops_per_token
from gpt.model.gpt import GPT
from gpt.optimizer.lr_schedule import learning_rate
from gpt.training.step import model_inputs
from tests.distributed.conftest import CONTEXT, Run

CPU = torch.device("cpu")
STEPS = 20


class PlainOptimizer:
    """The configured optimizer, built from torch's own ones on the whole parameters of one process."""

    def __init__(self, run: RunConfig, model: GPT) -> None:
        self.run, self.model = run, model
        self.split = {
            name: torch.split(parameter.detach().clone(), self._rows(name, len(parameter)))
            for name, parameter in model.named_parameters()
            if run.optimizer.name == "muon" and parameter.ndim == 2 and name.startswith("blocks.")
        }
        width_ratio = run.model.d_model / (run.model.mup_base_width or run.model.d_model)
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            ratio = width_ratio if parameter.ndim == 2 and name.startswith("blocks.") else 1.0
            decay = run.optimizer.weight_decay * ratio if parameter.ndim == 2 else 0.0
            if name not in self.split:
                groups.setdefault((ratio, decay), []).append(parameter)
        self.adamw = torch.optim.AdamW(
            [{"params": p, "ratio": ratio, "weight_decay": decay} for (ratio, decay), p in groups.items()],
            betas=run.optimizer.betas,
            eps=run.optimizer.eps,
            fused=False,
        )
        parts = [part for parts in self.split.values() for part in parts]
        self.muon = torch.optim.Muon(
            parts or [torch.zeros(1, 1)], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )

    def _rows(self, name: str, rows: int) -> list[int]:
        model = self.run.model
        if name.endswith("qkv.weight"):
            return [n * model.head_width for n in (model.n_heads, model.kv_heads, model.kv_heads)]
        return [rows // 2] * 2 if name.endswith("up.weight") else [rows]

    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr / group["ratio"]
        if self.run.optimizer.second_moment_init == "gradient" and not self.adamw.state:
            for parameter in self.model.parameters():
                gradient = parameter.grad
                assert gradient is not None
                state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(gradient)}
                self.adamw.state[parameter] = {**state, "exp_avg_sq": gradient**2}
        self.adamw.step()
        named = dict(self.model.named_parameters())
        for name, parts in self.split.items():
            for part, gradient in zip(
                parts, torch.split(named[name].grad, [len(p) for p in parts]), strict=True
            ):
                part.grad = gradient
        self.muon.param_groups[0]["lr"] = lr
        self.muon.step()
        for name, parts in self.split.items():
            named[name].data.copy_(torch.cat(parts))


def plain_loop(
    run: RunConfig, data_dir: Path, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[float], float]:
    """Losses, gradient norms and validation loss of one process that computes each whole batch at once.

    The network computes in `dtype`; the optimizer always works in fp32.
    """
    masters = GPT(run.model)
    masters.initialize(run.seed)
    model = GPT(run.model).place(CPU, dtype)
    optimizer = PlainOptimizer(run, masters)
    reader = BatchReader(
        [(data_dir, 1.0)], context=run.model.context, global_batch=run.batch_sizes, seed=run.seed
    )
    pairs = list(zip(model.parameters(), masters.parameters(), strict=True))
    losses, norms = [], []
    for step in range(1, run.total_steps + 1):
        for weight, master in pairs:
            weight.data.copy_(master.data)
        batch = reader.batch(step, rank=0, world_size=1)
        loss = model(*model_inputs(batch, CPU)) / int(batch.scored.sum())
        model.zero_grad()
        loss.backward()
        for weight, master in pairs:
            assert weight.grad is not None
            master.grad = weight.grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.parameters(), run.optimizer.grad_clip)))
        optimizer.step(learning_rate(run.schedule, run.optimizer.peak_lr, run.total_steps, step))
        losses.append(loss.item())
    for weight, master in pairs:
        weight.data.copy_(master.data)
    return losses, norms, plain_score(run, model, data_dir)


@torch.no_grad()
def plain_score(run: RunConfig, model: GPT, data_dir: Path) -> float:
    """The loss on the validation split, computed in one batch."""
    windows = EvaluationReader(
        data_dir, context=run.model.context, tokens=run.evaluation.tokens, document_mask=True
    )
    batch = windows.windows(0, len(windows))
    return float(model(*model_inputs(batch, CPU))) / int(batch.scored.sum())


MUP = {"model__initialization": "mup", "model__mup_base_width": 8, "optimizer__grad_clip": 0.1}
MUON = {"optimizer__name": "muon"}
GRADIENT = {"optimizer__second_moment_init": "gradient"}


# `ramp` holds the number of sequences in the first steps; later steps have all 8.
@pytest.mark.parametrize(
    ("stage", "processes", "micro_batch", "ramp", "fields"),
    [
        (1, 1, 8, [], {}),
        (1, 2, 1, [2, 2, 6], MUON),
        (2, 2, 2, [4, 4], MUP | GRADIENT | {"deterministic": True}),
        # Two processes with one core each compile for a minute.
        pytest.param(3, 2, 4, [], MUON | GRADIENT | {"compile": True}, marks=pytest.mark.chaos),
        (3, 1, 2, [2, 6], MUP | {"compile": True}),
        (2, 3, 2, [], {"batch__global_batch_tokens": 12 * CONTEXT}),
        (1, 2, 4, [4], {"parallel__sequence": 2, "model__n_kv_heads": 1}),
        (3, 4, 2, [], {"parallel__sequence": 2, "model__n_kv_heads": 2}),
    ],
)
def test_losses_and_gradient_norms_match_a_plain_loop(
    new_run: Callable[..., Run],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    processes: int,
    micro_batch: int,
    ramp: list[int],
    fields: dict[str, Any],
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon always iterates in bf16
    run = new_run(
        **{
            "zero__stage": stage,
            "batch__micro_batch": micro_batch,
            "batch__warmup": [{"steps": 1, "global_batch_tokens": size * CONTEXT} for size in ramp],
            "schedule__total_steps": STEPS,
            "optimizer__grad_clip": 0.5,  # low enough that some steps clip
            **fields,
        }
    )
    config = RunConfig.model_validate_json(run.dir.config.read_text())
    assert run.train(processes, cold=config.compile is True)["exit_code"] == 0
    losses, norms, score = plain_loop(config, data_dir)
    np.testing.assert_allclose(run.losses(), losses, rtol=1e-5)
    np.testing.assert_allclose([line["train/grad_norm"] for line in run.metrics()], norms, rtol=1e-4)
    assert max(norms) > config.optimizer.grad_clip  # it did clip
    assert run.metrics()[-1]["val/loss"] == pytest.approx(score, rel=1e-5)
    phases = {event["name"]: event["seconds"] for event in run.events("phase")}
    assert (phases.get("compile", 0.0) > 1.0) == (config.compile is True)
    [built] = run.events("network_built")
    assert built["attention"] == "sdpa" and built["peak_flops_per_second"] > 1e8
    for line in run.metrics():
        flops_per_second = flops_per_token(config.model) * line["train/tokens_per_second"]
        assert line["train/mfu"] == pytest.approx(flops_per_second / built["peak_flops_per_second"])
        assert line["train/mfu_causal"] < line["train/mfu"]
    tokens = [line["tokens"] for line in run.metrics()]
    assert (
        tokens
        == np.cumsum([*ramp, *[config.global_batch] * (STEPS - len(ramp))] * np.array(CONTEXT)).tolist()
    )


@pytest.mark.parametrize(("stage", "processes"), [(1, 2), (3, 3)])
def test_bf16_run_is_closer_to_a_plain_bf16_loop_than_that_is_to_fp32(
    new_run: Callable[..., Run], data_dir: Path, stage: int, processes: int
) -> None:
    batch = {"batch__micro_batch": 2, "batch__global_batch_tokens": 12 * CONTEXT}
    run = new_run(precision="bf16", zero__stage=stage, schedule__total_steps=STEPS, **batch)
    assert run.train(processes)["exit_code"] == 0
    config = RunConfig.model_validate_json(run.dir.config.read_text())
    plain, in_fp32 = (
        np.array(plain_loop(config, data_dir, dtype)[0]) for dtype in (torch.bfloat16, torch.float32)
    )
    assert np.abs(run.losses() - plain).max() < np.abs(plain - in_fp32).max() < 0.02


def test_ranks_score_unequal_numbers_of_tokens(data_dir: Path) -> None:
    """Otherwise the tests above would pass with a mean over the ranks, too."""
    reader = BatchReader([(data_dir, 1.0)], context=32, global_batch=8, seed=1234)
    counts = [[int(reader.batch(step, r, 2).scored.sum()) for r in (0, 1)] for step in range(1, STEPS + 1)]
    assert any(first != second for first, second in counts)
