"""The network against independent references: transformers, the formula, the closed forms."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpt.attention import Documents
from gpt.config import ModelConfig
from gpt.flops import flops_per_token, parameter_count, parameter_table
from gpt.layers import ACTIVATIONS, FeedForward, Linear
from gpt.model import GPT, positions

CPU = torch.device("cpu")
VOCABULARY = 101


def build(attention: str = "sdpa", **fields: object) -> GPT:
    shape = {"n_layers": 2, "d_model": 48, "n_heads": 4, "context": 24, "vocab_size": VOCABULARY}
    gpt = GPT(ModelConfig.model_validate({**shape, **fields, "attention": attention}))
    gpt.initialize(seed=3)
    return gpt.place(CPU, torch.float32)


def rows(tokens: torch.Tensor) -> Documents:
    """Each row one document."""
    b, t = tokens.shape
    return Documents.from_ends(np.arange(t, b * t + 1, t, dtype=np.int32))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_equal_those_of_transformers_llama(n_kv_heads: int, tie: bool) -> None:
    ours = build(n_kv_heads=n_kv_heads, tie_embeddings=tie, d_ff=96, rope_theta=5000.0)
    model = ours.model
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=model.d_model,
            intermediate_size=model.ffn_width,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            num_key_value_heads=n_kv_heads,
            max_position_embeddings=model.context,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=tie,
            attn_implementation="eager",
        )
    )
    state = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.final_norm.weight}
    state["lm_head.weight"] = ours.head.weight
    kv = n_kv_heads * model.head_width
    for i, block in enumerate(ours.blocks):
        name = f"model.layers.{i}"
        q, k, v = block.attention.qkv.weight.split((model.d_model, kv, kv))
        gate, up = block.ffn.up.weight.chunk(2)
        state |= {
            f"{name}.self_attn.q_proj.weight": q,
            f"{name}.self_attn.k_proj.weight": k,
            f"{name}.self_attn.v_proj.weight": v,
            f"{name}.self_attn.o_proj.weight": block.attention.output.weight,
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": block.ffn.down.weight,
            f"{name}.input_layernorm.weight": block.attention_norm.weight,
            f"{name}.post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    theirs.load_state_dict(state)
    tokens = random_tokens(3, 24)
    difference = (ours.logits(tokens, rows(tokens)) - theirs(tokens).logits).abs().max()
    assert difference <= 1e-4


def test_logits_equal_those_of_transformers_gpt2() -> None:
    ours = build(ffn="gelu", norm="layernorm", position="learned", bias=True, tie_embeddings=True)
    model = ours.model
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=model.context,
            n_embd=model.d_model,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            layer_norm_epsilon=model.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms that are not 0 and 1
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    assert ours.position is not None
    state = {"transformer.wte.weight": ours.embedding.weight, "transformer.wpe.weight": ours.position.weight}
    state |= {f"transformer.ln_f.{k}": v for k, v in ours.final_norm.named_parameters()}
    state["lm_head.weight"] = ours.embedding.weight
    pairs = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.output"}
    pairs |= {"mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}
    for i, block in enumerate(ours.blocks):
        name = f"transformer.h.{i}"
        state |= {f"{name}.ln_1.{k}": v for k, v in block.attention_norm.named_parameters()}
        state |= {f"{name}.ln_2.{k}": v for k, v in block.ffn_norm.named_parameters()}
        for their_name, our_name in pairs.items():
            linear = block.get_submodule(our_name)
            assert isinstance(linear, Linear)
            state[f"{name}.{their_name}.weight"] = linear.weight.t()  # their Conv1D is transposed
            state[f"{name}.{their_name}.bias"] = linear.bias
    theirs.load_state_dict(state, strict=False)
    tokens = random_tokens(3, 24)
    difference = (ours.logits(tokens, rows(tokens)) - theirs(tokens).logits).abs().max()
    assert difference <= 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_token_leaves_the_logits_before_it_unchanged(attention: str, position: str) -> None:
    gpt = build(attention, position=position)
    tokens = random_tokens(2, 24)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % VOCABULARY
    before, after = gpt.logits(tokens, rows(tokens)), gpt.logits(changed, rows(tokens))
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("ends", [(10, 24, 48), (24, 31, 48), (3, 5, 24, 25, 48)])
def test_no_document_sees_another(attention: str, position: str, ends: tuple[int, ...]) -> None:
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


def test_a_document_reads_the_same_wherever_it_stands() -> None:
    for position in ("rope", "learned"):
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


def test_positions_count_from_the_start_of_each_document() -> None:
    documents = Documents.from_ends(np.array([2, 5, 8], dtype=np.int32))
    assert positions(documents, torch.zeros(2, 4)).tolist() == [[0, 1, 0, 1], [2, 0, 1, 2]]


@pytest.mark.parametrize("ffn", sorted(ACTIVATIONS))
def test_feed_forward_follows_the_equations_of_shazeer(ffn: str) -> None:
    # arXiv:2002.05202, equations 1 to 6, written out; GELU there is exact, GPT-2's is the tanh form.
    layer = FeedForward(ModelConfig.model_validate({"d_model": 12, "n_heads": 2, "ffn": ffn, "d_ff": 20}))
    x = torch.randn(3, 12)
    up, down = layer.up.weight, layer.down.weight
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
        }[ffn]
        expected = activation(x @ up.t()) @ down.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_gated_variants_have_the_parameters_of_plain_ones() -> None:
    counts = {
        ffn: parameter_count(ModelConfig.model_validate({"d_model": 768, "ffn": ffn, "vocab_size": 128}))
        for ffn in ACTIVATIONS
    }
    assert max(counts.values()) == min(counts.values())


VARIANTS = [
    {},
    {"n_kv_heads": 2, "tie_embeddings": True},
    {"ffn": "gelu", "norm": "layernorm", "position": "learned", "bias": True},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_the_closed_form_lists_the_parameters_of_the_network(fields: dict[str, object]) -> None:
    gpt = build(**fields)
    assert list(parameter_table(gpt.model)) == [(n, tuple(p.shape)) for n, p in gpt.named_parameters()]
    assert parameter_count(gpt.model) == sum(p.numel() for p in gpt.parameters())


@pytest.mark.parametrize("fields", VARIANTS)
def test_flops_agree_with_torchs_counter(fields: dict[str, object]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    gpt = build("reference", **fields)
    tokens = random_tokens(2, 24)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens, rows(tokens)).backward()
    assert counter.get_total_flops() == pytest.approx(flops_per_token(gpt.model) * tokens.numel(), rel=0.02)


def test_gpt2_124m_has_the_published_number_of_parameters() -> None:
    gpt2 = {"ffn": "gelu", "norm": "layernorm", "position": "learned", "bias": True, "tie_embeddings": True}
    assert parameter_count(ModelConfig.model_validate({**gpt2, "vocab_size": 50257})) == 124_439_808


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = build(), build(), build()
    other.initialize(seed=4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.head.weight, other.head.weight)
    residual = first.blocks[0].ffn.down.weight
    assert residual.std().item() == pytest.approx(0.02 / 2, rel=0.1)  # 1/√(2L) with L = 2


def test_bf16_on_a_cpu_rounds_the_fp32_product() -> None:
    linear = Linear(64, 32, bias=True).to(torch.bfloat16)
    x = torch.randn(8, 64).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    error = (linear(x).double() - exact).abs() / exact.abs().clamp(min=0.1)
    assert linear(x).dtype == torch.bfloat16
    assert error.max() <= 2**-7
