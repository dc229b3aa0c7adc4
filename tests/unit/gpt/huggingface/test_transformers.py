"""Same weights, same logits, loss and gradients as transformers, over random configs."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt.model.gpt import GPT
from tests.unit.gpt.model.support import GPT2, build, in_their_layout, random_tokens, rows, twin_of

SCALINGS: list[dict[str, object] | None] = [
    None,
    {"kind": "linear", "factor": 3.0},
    {"kind": "yarn", "factor": 4.0, "original_context": 6},
    {"kind": "yarn", "factor": 2.0, "beta_fast": 3.0, "beta_slow": 0.5},
    {"kind": "llama3", "factor": 8.0, "original_context": 16},
    {"kind": "llama3", "factor": 2.0, "low_frequency_factor": 1.5, "high_frequency_factor": 2.5},
]


def random_llama(seed: int) -> dict[str, Any]:
    """Fields of a Llama, a Mistral (window) or a Qwen3 (QK-norm) in a small shape."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    family = draw.choice(["llama", "llama", "mistral", "qwen3", "qwen3 with a window"])
    fields = {
        "n_layers": draw.choice([1, 2, 3]),
        "n_heads": heads,
        "n_kv_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "d_model": draw.choice([24, 48, 60]),
        "d_head": draw.choice([8, 10, 32]),
        "context": 40,
        "d_ff": draw.choice([33, 96]),
        "ffn": draw.choice(["swiglu", "swiglu", "geglu", "reglu", "glu", "bilinear"]),
        "norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "rope_theta": draw.choice([500.0, 10_000.0, 500_000.0]),
        "rope_scaling": draw.choice(SCALINGS),
        "tie_embeddings": draw.random() < 0.5,
        "bias": family == "llama" and draw.random() < 0.5,
        "qk_norm": "qwen3" in family,
    }
    if family in ("mistral", "qwen3 with a window"):
        fields["window"] = draw.choice([1, 3, 7, 20])
    return fields


def random_gpt2(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return {
        **GPT2,
        "n_layers": draw.choice([1, 2, 3]),
        "n_heads": draw.choice([1, 2, 4]),
        "d_model": draw.choice([32, 48]),
        "d_ff": draw.choice([64, 100]),
        "context": 40,
        "ffn": draw.choice(["gelu", "gelu", "relu", "swish", "relu2"]),
        "norm_eps": draw.choice([1e-5, 1e-3]),
        "tie_embeddings": draw.random() < 0.7,
    }


def compare(ours: GPT) -> None:
    theirs = twin_of(ours)
    tokens, targets = random_tokens(2, 40), random_tokens(2, 40, seed=6)
    targets[0, :7] = -100
    logits = theirs(tokens).logits
    assert (ours.logits(tokens, rows(tokens)) - logits).abs().max() <= 1e-4
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    loss = ours(tokens, targets, rows(tokens))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, gradient in in_their_layout(ours, gradients=True).items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("seed", range(16))
def test_random_llama_mistral_and_qwen3_equal_transformers(seed: int) -> None:
    compare(build(**random_llama(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_random_gpt2_equals_transformers(seed: int) -> None:
    compare(build(**random_gpt2(seed)))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_rope_scaling_equals_transformers(scaling: dict[str, object] | None) -> None:
    compare(build(context=40, rope_scaling=scaling))


def test_dropout_equals_gpt2_of_transformers() -> None:
    # one row: the reference kernel and their eager attention then draw the same numbers in the same order
    ours = build("reference", **GPT2, dropout=0.3)
    theirs = twin_of(ours).train()
    tokens = random_tokens(1, 24)
    torch.manual_seed(11)
    expected = theirs(tokens).logits
    torch.manual_seed(11)
    assert (ours.logits(tokens, rows(tokens)) - expected).abs().max() <= 1e-4
    assert (ours.eval().logits(tokens, rows(tokens)) - expected).abs().max() > 0.1
