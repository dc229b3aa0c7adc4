"""The network against the formulas of the papers and against closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_count, parameter_table
from gpt.model.attention import Documents
from gpt.model.flops import causal_flops_per_token, flops_per_token
from gpt.model.layers import ACTIVATIONS, FeedForward, Linear
from gpt.model.positions import positions
from gpt.training.peak_flops import of_gpu
from tests.unit.gpt.model.support import VOCABULARY, build, random_tokens, rows


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
def test_a_token_does_not_change_the_logits_before_it(attention: str, position: str) -> None:
    gpt = build(attention, position=position)
    tokens = random_tokens(2, 24)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % VOCABULARY
    before, after = gpt.logits(tokens, rows(tokens)), gpt.logits(changed, rows(tokens))
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("ends", [(10, 24, 48), (24, 31, 48), (3, 5, 24, 25, 48)])
def test_documents_do_not_attend_to_each_other(attention: str, position: str, ends: tuple[int, ...]) -> None:
    gpt = build(attention, position=position)
    documents = Documents.from_ends(np.array(ends, dtype=np.int32))
    tokens = random_tokens(2, 24)
    base = gpt.logits(tokens, documents).flatten(0, 1)
    for start, end in zip((0, *ends), ends, strict=False):
        changed = tokens.flatten().clone()
        changed[start:end] = (changed[start:end] + 7) % VOCABULARY
        other = gpt.logits(changed.view_as(tokens), documents).flatten(0, 1)
        outside = torch.ones(len(changed), dtype=torch.bool)
        outside[start:end] = False
        assert torch.equal(base[outside], other[outside])
        assert not torch.equal(base[start:end], other[start:end])


def test_logits_of_a_document_do_not_depend_on_its_place_in_the_row() -> None:
    for position in ("rope", "learned", "sinusoidal", "none"):
        gpt = build(position=position)
        document = random_tokens(1, 9)
        alone = gpt.logits(document, rows(document))[0]
        packed = torch.cat((random_tokens(1, 6), document, random_tokens(1, 9)), dim=1)
        documents = Documents.from_ends(np.array([6, 15, 24], dtype=np.int32))
        torch.testing.assert_close(gpt.logits(packed, documents)[0, 6:15], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_sdpa_equals_the_formula_forward_and_backward(n_kv_heads: int) -> None:
    documents = Documents.from_ends(np.array([5, 24, 36, 48], dtype=np.int32))
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24)
    gradients = []
    for attention in ("sdpa", "reference"):
        gpt = build(attention, n_kv_heads=n_kv_heads)
        loss = gpt(tokens, targets, documents)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_positions_start_at_zero_in_each_document() -> None:
    documents = Documents.from_ends(np.array([2, 5, 8], dtype=np.int32))
    assert positions(documents, torch.zeros(2, 4)).tolist() == [[0, 1, 0, 1], [2, 0, 1, 2]]


@pytest.mark.parametrize("ffn", sorted(ACTIVATIONS))
def test_feed_forward_follows_the_equations_of_shazeer(ffn: str) -> None:
    # arXiv:2002.05202, equations 1 to 6, written out; GELU there is exact, GPT-2's is the tanh form.
    layer = FeedForward(ModelConfig.model_validate({"d_model": 12, "n_heads": 2, "ffn": ffn, "d_ff": 20}))
    x = torch.randn(3, 12)
    up, down = (nn.init.normal_(part.weight, std=0.3) for part in (layer.up, layer.down))
    if layer.is_gated:
        w, v = up[:20], up[20:]
        gate = {
            "glu": lambda z: 1 / (1 + torch.exp(-z)),
            "bilinear": lambda z: z,
            "reglu": lambda z: z.clamp(min=0),
            "geglu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
            "swiglu": lambda z: z / (1 + torch.exp(-z)),
        }[ffn]
        expected = (gate(x @ w.t()) * (x @ v.t())) @ down.t()
    else:
        activation = {
            "relu": lambda z: z.clamp(min=0),
            "gelu": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
            "swish": lambda z: z / (1 + torch.exp(-z)),
            "relu2": lambda z: z.clamp(min=0) ** 2,  # Primer, arXiv:2109.08668
        }[ffn]
        expected = activation(x @ up.t()) @ down.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_gated_and_plain_variants_have_equally_many_parameters() -> None:
    counts = {
        ffn: parameter_count(ModelConfig.model_validate({"d_model": 768, "ffn": ffn, "vocab_size": 128}))
        for ffn in ACTIVATIONS
    }
    assert max(counts.values()) == min(counts.values())


VARIANTS = [
    {},
    {"n_kv_heads": 2, "tie_embeddings": True},
    {"ffn": "gelu", "norm": "layernorm", "position": "learned", "bias": True},
    {"ffn": "relu", "norm": "layernorm", "norm_placement": "post", "position": "sinusoidal", "bias": True},
    {"ffn": "relu2", "qk_norm": True, "d_head": 20, "n_kv_heads": 1, "position": "none"},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_parameter_table_lists_the_parameters_of_the_network(fields: dict[str, object]) -> None:
    gpt = build(**fields)
    assert list(parameter_table(gpt.model)) == [(n, tuple(p.shape)) for n, p in gpt.named_parameters()]
    assert parameter_count(gpt.model) == sum(p.numel() for p in gpt.parameters())


@pytest.mark.parametrize("fields", VARIANTS)
def test_flops_per_token_agree_with_torchs_counter(fields: dict[str, object]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    gpt = build("reference", **fields)
    tokens = random_tokens(2, 24)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens, rows(tokens)).backward()
    assert counter.get_total_flops() == pytest.approx(flops_per_token(gpt.model) * tokens.numel(), rel=0.02)


@pytest.mark.parametrize("window", [None, 5, 23])
def test_causal_flops_count_the_keys_that_a_token_sees(window: int | None) -> None:
    model = build(context=24, window=window).model
    seen = [min(position + 1, window or 24) for position in range(24)]
    per_key = 12 * model.n_layers * model.n_heads * model.head_width
    full, causal = flops_per_token(model), causal_flops_per_token(model)
    assert causal == pytest.approx(full - per_key * (min(window or 24, 24) - sum(seen) / 24))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA GB2000 Super", None),
    ],
)
def test_peak_flops_are_found_by_the_name_of_the_gpu(name: str, tflops: float | None) -> None:
    assert of_gpu(name, "bf16") == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_gpt2_124m_has_the_published_number_of_parameters() -> None:
    gpt2 = {"ffn": "gelu", "norm": "layernorm", "position": "learned", "bias": True, "tie_embeddings": True}
    assert parameter_count(ModelConfig.model_validate({**gpt2, "vocab_size": 50257})) == 124_439_808


def test_bf16_linear_on_a_cpu_rounds_the_fp32_product() -> None:
    linear = Linear(64, 32, bias=True).to(torch.bfloat16)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(8, 64).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    error = (linear(x).double() - exact).abs() / exact.abs().clamp(min=0.1)
    assert linear(x).dtype == torch.bfloat16
    assert error.max() <= 2**-7
