"""The memory plan, against what torch holds and against published numbers."""

from typing import Any

import numpy as np
import pytest
import torch

from gpt.config.data import BatchConfig
from gpt.config.parallel import ZeroConfig
from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from gpt.config.zero_sizes import zero_sizes
from gpt.distributed.zero.build import DTYPES
from gpt.model import hardware
from gpt.model.attention import Documents
from gpt.model.flops import flops_per_token
from gpt.model.gpt import GPT
from launcher.preflight.memory import (
    activation_bytes,
    gradient_traffic_bytes,
    largest_micro_batch,
    memory,
)
from launcher.preflight.plan import gpu_hours
from launcher.runs.recipes import run_tables

CONTEXT = 128


def config(precision: str = "bf16", micro_batch: int = 2, **model: Any) -> RunConfig:
    shape = {"n_layers": 6, "d_model": 128, "n_heads": 4, "context": CONTEXT, "vocab_size": 512}
    return RunConfig.model_validate(
        {
            "name": "memory",
            "precision": precision,
            "model": shape | model,
            "data": {"path": "none"},
            "batch": {"global_batch_tokens": 8 * CONTEXT, "micro_batch": micro_batch},
            "schedule": {"total_steps": 1},
        }
    )


def saved_bytes(run: RunConfig) -> int:
    """What autograd keeps between the forward and the backward pass, each storage once."""
    model = GPT(run.model)
    model.initialize(1)
    model.place(torch.device("cpu"), DTYPES[run.precision])
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, run.model.vocabulary, (run.batch.micro_batch, CONTEXT))
    ends = np.arange(1, run.batch.micro_batch + 1, dtype=np.int32) * CONTEXT
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens, Documents.from_ends(ends))
    # The loss also keeps the gradient of its input, which autograd does not know of.
    at_head = tokens.numel() * run.model.d_model * (4 if run.precision == "fp32" else 2)
    return sum(storage.nbytes() for storage in kept.values()) + at_head


@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("bf16", {}),
        ("fp32", {}),
        ("fp32", {"norm": "layernorm", "ffn": "gelu", "bias": True, "position": "learned"}),
        ("bf16", {"norm": "layernorm", "ffn": "relu", "norm_placement": "post", "position": "sinusoidal"}),
        ("bf16", {"n_kv_heads": 1, "qk_norm": True, "ffn": "geglu"}),
        ("bf16", {"ffn": "bilinear", "n_kv_heads": 2}),
        ("bf16", {"ffn": "relu2"}),
    ],
)
def test_planned_activations_are_what_autograd_keeps(
    precision: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plan does not count what a CPU that computes bf16 in fp32 keeps in addition.
    monkeypatch.setitem(hardware.CPU_MULTIPLIES, torch.bfloat16, True)
    run = config(precision, **model)
    assert activation_bytes(run, on_cpu=True) == pytest.approx(saved_bytes(run), rel=0.1)


def test_a_gpu_keeps_less_for_its_norms_than_a_cpu() -> None:
    run = config(n_kv_heads=2, qk_norm=True)
    tokens, layers, d, heads, e = 2 * CONTEXT, 6, 128, 4 + 2, 32
    norms = (2 * layers + 1) * 4 * d  # the input of each in fp32
    less = tokens * (norms + layers * heads * ((4 + 2) * e - 4))
    assert activation_bytes(run, on_cpu=True) - activation_bytes(run) == less


def test_sequence_parallel_ranks_share_the_activations() -> None:
    shared = RunConfig.model_validate(config().model_dump() | {"parallel": {"sequence": 2}})
    assert activation_bytes(shared) * 2 == activation_bytes(config())
    assert shared.micro_batches(4) == config().micro_batches(2)


def test_recomputation_keeps_the_input_of_each_block_and_one_whole_block() -> None:
    none, selective, full = (activation_bytes(config(recompute=r)) for r in ("none", "selective", "full"))
    assert full < selective < none
    tokens, d = 2 * CONTEXT, 128
    assert none - full == pytest.approx(5 / 6 * none, rel=0.1)  # one of six blocks exists at a time
    assert full - activation_bytes(config(recompute="full", n_layers=5)) == 2 * tokens * d


def test_each_zero_stage_shards_what_the_paper_says() -> None:
    """ZeRO, arXiv:1910.02054, figure 1: 7.5 B parameters on 64 GPUs, Adam in mixed precision.

    There gradients are kept in 16 bits; here micro-batches accumulate in fp32.
    """
    base = {
        "name": "zero",
        "model": {"n_layers": 56, "d_model": 3328, "n_heads": 26, "context": 1024, "vocab_size": 32000},
        "data": {"path": "none"},
        "batch": {"global_batch_tokens": 2 * 64 * 1024, "micro_batch": 1},
        "schedule": {"total_steps": 1},
    }
    parameters = 7.66e9
    for stage, weights, gradients in ((1, 2.0, 4.0), (2, 2.0, 4 / 64), (3, 2 / 64, 4 / 64)):
        run = RunConfig.model_validate(base | {"zero": {"stage": stage}})
        found, buckets = memory(run, 64), (0, 4, 4)[stage - 1] * zero_sizes(run).bucket_numel
        assert found.gradients - buckets == pytest.approx(gradients * parameters, rel=0.01)
        assert found.weights == pytest.approx(weights * parameters, rel=0.01)
        assert found.optimizer == pytest.approx(12 / 64 * parameters, rel=0.01)


def test_secondary_shards_are_one_more_copy_of_the_weights() -> None:
    run = config(micro_batch=1)
    without, with_copy = (
        memory(run.with_tables(zero=ZeroConfig(stage=3, secondary_shards=shards)), 8) for shards in (1, 4)
    )
    assert with_copy.weights - without.weights == 2 * parameter_count(run.model) // 4


def test_the_plan_counts_the_configured_gradient_bucket() -> None:
    tables = config().model_dump()
    default, smaller = (
        memory(RunConfig.model_validate({**tables, "zero": {"stage": 2, **fields}}), 2).gradients
        for fields in ({}, {"bucket_numel": 1000})
    )
    assert default - smaller == 2 * 2 * (2**24 - 1000)  # two buckets, one fills while the other is reduced


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_counts_what_a_reduction_in_fp32_costs(stage: int) -> None:
    run = config(micro_batch=2)  # two micro-batches a step on two ranks
    in_fp32, in_bf16 = (
        run.with_tables(zero=ZeroConfig(stage=stage, bucket_numel=1000, reduce_dtype=dtype))
        for dtype in ("fp32", "bf16")
    )
    assert gradient_traffic_bytes(in_fp32, 2) == 2 * gradient_traffic_bytes(in_bf16, 2)
    times = 1 if stage == 1 else 2
    assert gradient_traffic_bytes(in_fp32, 2) == 4 * parameter_count(run.model) * times
    assert gradient_traffic_bytes(in_fp32, 1) == 0
    more = [a.workspace + a.gradients for a in (memory(in_fp32, 2), memory(in_bf16, 2))]
    # At stage 1 the sum of the micro-batches is in fp32 already, and a reduction in bf16 copies all of it. At
    # stage 2 the copy of a gradient is smaller than the loss's buffers here. At stage 3 the bucket, which is
    # still there in the update, has that dtype.
    assert more[0] - more[1] == (-2 * parameter_count(run.model), 0, 2 * 2 * 1000)[stage - 1]


def test_largest_micro_batch_is_the_largest_that_fits() -> None:
    run = config(micro_batch=1)
    sizes = {n: memory(config(micro_batch=n), 1).peak for n in (1, 2, 4, 8)}
    assert largest_micro_batch(run, 1, available=sizes[4]) == 4
    assert largest_micro_batch(run, 1, available=sizes[8] - 1) == 4
    assert largest_micro_batch(run, 1, available=sizes[1] - 1) is None


def test_largest_micro_batch_of_an_enormous_batch_is_found_at_once() -> None:
    one = config(micro_batch=1)
    run = one.with_tables(batch=BatchConfig(global_batch_tokens=CONTEXT * 3**40, micro_batch=1))
    available = memory(run.with_tables(batch=run.batch.with_micro_batch(1000)), 1).peak
    assert largest_micro_batch(run, 1, available=available) == 3**6


@pytest.mark.parametrize(
    ("recipe", "published_hours"), [("llama-7b", 184_320), ("llama-13b", 368_640), ("llama-70b", 1_720_320)]
)
def test_gpu_hours_match_those_that_llama_2_reports(recipe: str, published_hours: int) -> None:
    """arXiv:2307.09288, table 2: A100-80GB hours for 2 T tokens, which imply a usual MFU."""
    tables, _ = run_tables(recipe, ("data.path=none",))
    run = RunConfig.model_validate(tables)
    whole = float(flops_per_token(run.model)) * 2e12
    assert 0.42 < gpu_hours(whole, "a100-80gb", "bf16", 1.0) / published_hours < 0.47


def test_gpu_hours_use_the_peak_of_the_precision() -> None:
    """An A100's data sheet says 19.5 TFLOP/s for fp32 without TF32, which is torch's default."""
    assert gpu_hours(19.5e12 * 3600, "a100-40gb", "fp32", 0.5) == pytest.approx(2.0)
