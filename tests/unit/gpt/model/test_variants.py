"""Each variant of the network against its formula, torch's layers, or transformers' functions."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from gpt.config.model import ModelConfig
from gpt.model import layers
from gpt.model.attention import Documents, Scores, choose, reference, sdpa
from gpt.model.gpt import Block, Cache, seed_dropout
from gpt.model.layers import RMSNorm
from gpt.model.loss import cross_entropy_sum
from gpt.model.positions import sinusoid_table
from tests.unit.gpt.model.support import CPU, GPT2, build, random_tokens, rows


def one_document(length: int) -> Documents:
    return Documents.from_ends(np.array([length], dtype=np.int32))


def random_qkv(length: int, heads: int, kv_heads: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(length, h, width, generator=generator) * 2 for h in (heads, kv_heads, kv_heads)]


def test_sinusoids_follow_the_equations_of_vaswani() -> None:
    table = sinusoid_table(context=50, d_model=12)
    for position in (0, 1, 7, 49):
        for i in range(6):
            angle = position / 10_000 ** (2 * i / 12)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_rmsnorm_of_a_gpu_equals_that_of_a_cpu(
    dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU calls torch's own rms_norm, which is one kernel there."""
    called: list[Any] = []
    function = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *inputs: called.append(inputs[1:]) or function(*inputs))
    norm = RMSNorm(16, eps=1e-3).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    found = []
    for is_cpu in (True, False):
        monkeypatch.setattr(layers, "is_cpu", lambda _, is_cpu=is_cpu: is_cpu)
        x.grad = norm.weight.grad = None
        out = norm(x)
        (out.float() ** 3).sum().backward()
        found.append((out.detach(), x.grad, norm.weight.grad))
    assert called == [((16,), norm.weight, 1e-3)]
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu.dtype == dtype
        assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < rounding


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("ffn", ["relu", "gelu"])
def test_a_block_equals_torchs_transformer_layer(placement: str, ffn: str) -> None:
    model = ModelConfig.model_validate(
        {
            "d_model": 32,
            "n_heads": 4,
            "d_ff": 40,
            "ffn": ffn,
            "norm": "layernorm",
            "norm_placement": placement,
        }
        | {"bias": True, "position": "none"}
    )
    block = Block(model)
    theirs = nn.TransformerEncoderLayer(
        32,
        4,
        40,
        dropout=0.0,
        activation=F.relu if ffn == "relu" else lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True,
        norm_first=placement == "pre",
    )
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.output."}
    names |= {
        "linear1.": "ffn.up.",
        "linear2.": "ffn.down.",
        "norm1.": "attention_norm.",
        "norm2.": "ffn_norm.",
    }
    with torch.no_grad():
        for theirs_prefix, ours_prefix in names.items():
            for kind in ("weight", "bias"):
                parameter = block.get_parameter(ours_prefix + kind)
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
                theirs.get_parameter(theirs_prefix + kind).copy_(parameter)
    x = torch.randn(2, 9, 32)
    documents = rows(torch.zeros(2, 9))
    out = block(x, None, lambda q, k, v: sdpa(q, k, v, documents, Scores()))
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(out, theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


def test_embeddings_with_sinusoids_are_scaled_by_the_root_of_the_width() -> None:
    gpt = build(position="sinusoidal", norm="layernorm", norm_placement="post", n_layers=1)
    seen = []
    gpt.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = random_tokens(1, 24)
    gpt.logits(tokens, rows(tokens))
    expected = gpt.embedding.weight[tokens[0]] * 48**0.5 + sinusoid_table(24, 48)
    torch.testing.assert_close(seen[0][0], expected)


def test_one_layer_without_positions_ignores_the_order_of_tokens() -> None:
    gpt = build(position="none", n_layers=1)
    tokens = random_tokens(1, 24)
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    last = gpt.logits(tokens, rows(tokens))[:, -1]
    torch.testing.assert_close(gpt.logits(shuffled, rows(tokens))[:, -1], last, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(build(n_layers=1).logits(shuffled, rows(tokens))[:, -1], last, atol=1e-2)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_formula_equals_transformers_attention(
    kv_heads: int, window: int | None, softcap: float | None
) -> None:
    qkv = random_qkv(20, 4, kv_heads)
    ours = reference(*qkv, one_document(20), Scores(window, softcap))
    distance = torch.arange(20)[:, None] - torch.arange(20)[None, :]
    is_hidden = (distance < 0) | (distance >= (window or 99))
    mask = torch.zeros(1, 1, 20, 20).masked_fill(is_hidden, -math.inf)
    module: Any = SimpleNamespace(num_key_value_groups=4 // kv_heads, training=False)
    theirs, _ = eager_attention_forward(
        module, *(x.transpose(0, 1)[None] for x in qkv), mask, scaling=8**-0.5, softcap=softcap
    )
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("window", [1, 2, 5, 11])
@pytest.mark.parametrize("ends", [(24,), (1, 2, 13, 24), (8, 16, 24)])
def test_sdpa_in_a_window_equals_the_formula_forward_and_backward(
    kv_heads: int, window: int, ends: tuple[int, ...]
) -> None:
    documents = Documents.from_ends(np.array(ends, dtype=np.int32))
    results = []
    for attend in (sdpa, reference):
        qkv = [x.clone().requires_grad_() for x in random_qkv(24, 4, kv_heads)]
        out = attend(*qkv, documents, Scores(window=window))
        (out**2).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_tokens_before_the_window_have_no_effect() -> None:
    gpt = build(window=4, n_layers=1)
    tokens = random_tokens(1, 24)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 101
    same = (gpt.logits(tokens, rows(tokens)) == gpt.logits(changed, rows(tokens))).all(-1)[0]
    assert (~same).nonzero().flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
def test_the_chunked_loss_and_its_gradient_equal_the_plain_ones(
    softcap: float | None, z_loss: float, chunk_rows: int
) -> None:
    generator = torch.Generator().manual_seed(8)
    hidden, weight = torch.randn(23, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (23,), generator=generator)
    targets[[0, 5, 22]] = -100
    results = []
    for is_ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if is_ours:
            loss = cross_entropy_sum(h, w, targets, softcap=softcap, z_loss=z_loss, chunk_rows=chunk_rows)
        else:
            logits = h @ w.t()
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            loss = loss + z_loss * (logits.logsumexp(-1)[targets != -100] ** 2).sum()
        (loss * 0.25).backward()
        results.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_loss_without_gradient_and_loss_without_scored_targets() -> None:
    gpt = build(z_loss=0.1, logit_softcap=3.0).eval()
    tokens, none = random_tokens(2, 24), torch.full((2, 24), -100)
    with torch.no_grad():
        logits = gpt.logits(tokens, rows(tokens))
        assert logits.abs().max() <= 3.0
        expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
        torch.testing.assert_close(gpt(tokens, tokens, rows(tokens)), expected)  # no z-loss in evaluation
    loss = gpt.train()(tokens, none, rows(tokens))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in gpt.parameters())


def test_dropout_is_a_function_of_seed_step_and_rank() -> None:
    gpt = build(dropout=0.2)
    tokens = random_tokens(2, 24)

    def loss(*where: int) -> float:
        seed_dropout(*where)
        return gpt(tokens, tokens, rows(tokens)).item()

    first = loss(1, 10, 0)
    assert loss(1, 10, 0) == first
    assert len({first, loss(2, 10, 0), loss(1, 11, 0), loss(1, 10, 1), loss(1, 0, 10)}) == 5


def test_dropout_drops_the_configured_share_of_embeddings_and_attention_weights() -> None:
    gpt = build(dropout=0.25, n_layers=1)
    seen = []
    gpt.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = random_tokens(40, 24)
    seed_dropout(0, 0, 0)
    gpt.logits(tokens, rows(tokens))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    for attend in (sdpa, reference):
        q, k = (torch.randn(512, 1, 8) for _ in range(2))
        out = attend(q, k, torch.ones(512, 1, 8), one_document(512), Scores(dropout=0.25))
        assert out.mean().item() == pytest.approx(1.0, abs=0.1)  # what is kept is scaled by 1 / (1 - p)
        assert out.std().item() > 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 100, "n_heads": 12}, "d_model = 100 is not a multiple of model.n_heads = 12"),
        ({"n_kv_heads": 5}, "n_kv_heads = 5 does not divide model.n_heads = 12. These do: 1, 2, 3, 4, 6, 12"),
        ({"d_head": 15}, "'rope' needs an even head width; it is 15"),
        ({"position": "sinusoidal", "d_model": 15, "n_heads": 5}, "needs an even d_model; it is 15"),
        (
            {"position": "learned", "rope_theta": 5.0},
            "rope_theta has no effect with model.position = 'learned'",
        ),
        (
            {"position": "none", "rope_scaling": {"kind": "linear", "factor": 2.0}},
            "rope_scaling has no effect with model.position = 'none'",
        ),
        ({"window": 1024}, "window = 1024 has no effect: the context has 1024 tokens"),
        (
            {"attention": "sdpa", "attention_softcap": 50.0},
            "'sdpa' cannot compute this model: it has no soft-cap, and model.attention_softcap = 50",
        ),
        ({"attention_softcap": 50.0, "dropout": 0.1}, "no kernel combines them"),
        (
            {"attention": "flash-3", "dropout": 0.1},
            "it has no dropout, and model.dropout = 0.1. Use one of: auto, flash-2, sdpa, reference.",
        ),
        (
            {"attention": "flash-2", "d_head": 260},
            "multiple of 8 up to 256, and it is 260. Use one of: auto, sdpa, reference.",
        ),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2.0, "beta_slow": 40.0}},
            "beta_slow = 40 must be below beta_fast = 32",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "factor": 2.0, "low_frequency_factor": 4.0}},
            "low_frequency_factor = 4 must be below high_frequency_factor = 4",
        ),
    ],
)
def test_meaningless_combinations_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate(fields)
    assert message in str(error.value)


def test_auto_chooses_the_formula_if_no_other_kernel_has_a_soft_cap() -> None:
    assert choose(ModelConfig(attention_softcap=50.0), CPU, torch.float32)[0] == "reference"


@torch.no_grad()
def test_every_variant_computes_with_a_cache_what_it_computes_at_once() -> None:

    variants: list[dict[str, object]] = [
        {"n_kv_heads": 1, "qk_norm": True, "d_head": 20},
        {"window": 5},
        {"attention_softcap": 2.0, "logit_softcap": 3.0},
        {"norm": "layernorm", "norm_placement": "post", "position": "sinusoidal", "ffn": "relu"},
        {"position": "none", "ffn": "relu2"},
        GPT2,
    ]
    for fields in variants:
        gpt = build("auto", **fields).eval()
        tokens = random_tokens(1, 24)
        whole = gpt.logits(tokens, rows(tokens))
        cache = Cache(gpt)
        parts = [gpt.logits(part, rows(part), cache) for part in tokens.split([9, 1, 1, 5, 1, 7], dim=1)]
        assert cache.length == 24
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
