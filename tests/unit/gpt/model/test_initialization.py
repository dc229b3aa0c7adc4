"""Initial weights, and what muP keeps constant as the network grows wider."""

import math

import pytest
import torch
from pydantic import ValidationError

from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig
from gpt.model.gpt import GPT
from gpt.optimizer.build import build_optimizer, parameter_groups, set_rate
from tests.unit.gpt.model.support import CPU, GPT2, MUP, build, random_tokens, rows


def fresh(**fields: object) -> GPT:
    shape = {"n_layers": 3, "d_model": 96, "n_heads": 4, "context": 24, "vocab_size": 202}
    gpt = GPT(ModelConfig.model_validate({**shape, **fields}))
    gpt.initialize(seed=3)
    return gpt.place(CPU, torch.float32)


@pytest.mark.parametrize("fields", [{}, {"initialization": "llama"}, MUP])
def test_initial_weights_are_a_function_of_the_seed(fields: dict[str, object]) -> None:
    first, again, other = fresh(**fields), fresh(**fields), fresh(**fields)
    other.initialize(4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.head.weight, other.head.weight)


def deviations(gpt: GPT) -> dict[str, float]:
    return {name: p.std().item() for name, p in gpt.named_parameters() if p.ndim == 2}


def test_gpt2_weights_have_std_002_and_residual_ones_are_scaled_down() -> None:
    gpt = fresh(**GPT2)
    for name, deviation in deviations(gpt).items():
        is_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
        assert deviation == pytest.approx(0.02 / math.sqrt(6) if is_residual else 0.02, rel=0.05), name
    assert not gpt.blocks[0].ffn.up.bias.any() and (gpt.final_norm.weight == 1).all()


@pytest.mark.parametrize("is_tied", [True, False])
def test_llama_weights_are_drawn_as_in_torchtitan(is_tied: bool) -> None:
    gpt = fresh(initialization="llama", tie_embeddings=is_tied)
    found = deviations(gpt)
    # Truncated at three standard deviations, a normal keeps 98.7% of its standard deviation.
    assert found.pop("embedding.weight") == pytest.approx(0.0987 / 0.9798 if is_tied else 1.0, rel=0.04)
    head = gpt.head.weight
    assert head.std().item() == pytest.approx(0.987 * 96**-0.5, rel=0.05)
    assert head.abs().max() <= 3 * 96**-0.5
    found.pop("head.weight", None)
    for layer, block in enumerate(gpt.blocks):
        scaled = 0.02 / math.sqrt(2 * (layer + 1))
        gate, value = block.ffn.up.weight.chunk(2)
        assert gate.std().item() == pytest.approx(0.02, rel=0.05)
        assert value.std().item() == pytest.approx(scaled, rel=0.05)
        assert found[f"blocks.{layer}.attention.qkv.weight"] == pytest.approx(0.02, rel=0.05)
        for name in ("attention.output", "ffn.down"):
            assert found[f"blocks.{layer}.{name}.weight"] == pytest.approx(scaled, rel=0.05)


def test_mup_at_the_base_width_trains_like_the_default() -> None:
    usual, mup = fresh(), fresh(initialization="mup", mup_base_width=96)
    tokens = random_tokens(2, 24)
    losses = []
    for gpt in (usual, mup):
        optimizer = build_optimizer(gpt, OptimizerConfig(), torch.float32)
        for _ in range(3):
            loss = gpt(tokens, tokens, rows(tokens)) / tokens.numel()
            optimizer.zero_grad()
            loss.backward()
            set_rate(optimizer, 1e-3)
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


def test_mup_scales_rate_and_decay_of_hidden_matrices_only() -> None:
    gpt = build(**MUP, d_model=64, position="learned", bias=True, norm="layernorm")
    optimizer = build_optimizer(gpt, OptimizerConfig(weight_decay=0.2), torch.float32)
    set_rate(optimizer, 8e-3)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {"decay": (8e-3, 0.2), "hidden": (2e-3, 0.8), "no_decay": (8e-3, 0.0)}
    members = {
        group: [name for name, _ in members]
        for group, members in parameter_groups(gpt, OptimizerConfig()).items()
    }
    assert members["decay"] == ["embedding.weight", "position.weight", "head.weight"]
    hidden = ["attention.qkv", "attention.output", "ffn.up", "ffn.down"]
    assert members["hidden"] == [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in hidden]


WIDTHS = (64, 128, 256, 512)
MORE_HEADS: dict[str, object] = {"d_head": 16}
WIDER_HEADS: dict[str, object] = {"n_heads": 4, "mup_base_head_width": 16}


def coordinates(width: int, **fields: object) -> dict[str, float]:
    """Mean |x| of each part's output, and of its change, after four steps of Adam at one rate."""
    shape = {"n_layers": 2, "d_model": width, "n_heads": width // 16, "d_ff": 2 * width}
    gpt = fresh(**{**shape, **fields})
    optimizer = build_optimizer(gpt, OptimizerConfig(weight_decay=0.0), torch.float32)
    tokens, targets = random_tokens(4, 24), random_tokens(4, 24, seed=8)

    def seen() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
            for name, module in gpt.named_modules()
            if name.endswith(("attention", "ffn", "head"))
        ]
        with torch.no_grad():
            gpt.logits(tokens, rows(tokens))
        for hook in hooks:
            hook.remove()
        return found

    before = seen()
    for _ in range(4):
        optimizer.zero_grad()
        (gpt(tokens, targets, rows(tokens)) / targets.numel()).backward()
        set_rate(optimizer, 4e-3)
        optimizer.step()
    after = seen()
    sizes = {name: out.abs().mean().item() for name, out in after.items()}
    return sizes | {
        f"change of {name}": (out - before[name]).abs().mean().item() for name, out in after.items()
    }


def slopes(**fields: object) -> dict[str, float]:
    """The exponent of the width with which each coordinate grows, by least squares."""
    found = [coordinates(width, **fields) for width in WIDTHS]
    x = torch.tensor(WIDTHS).log()
    x = x - x.mean()
    ys = {name: torch.tensor([at[name] for at in found]).log() for name in found[0]}
    return {name: float((x * y).sum() / (x * x).sum()) for name, y in ys.items()}


@pytest.mark.parametrize("fields", [MORE_HEADS, WIDER_HEADS, {**MORE_HEADS, "tie_embeddings": True}])
def test_activations_and_their_changes_do_not_grow_with_the_width_in_mup(
    fields: dict[str, object],
) -> None:
    # The coordinate check of Tensor Programs V (arXiv:2203.03466), appendix D.1
    found = slopes(initialization="mup", mup_base_width=64, **fields)
    print(found)
    assert all(abs(slope) < 0.25 for slope in found.values()), found


def test_activations_and_their_changes_grow_with_the_width_without_mup() -> None:
    found = slopes(**MORE_HEADS)
    print(found)
    assert min(found.values()) > 0.8, found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initialization": "mup"}, "muP, and only muP, needs the d_model"),
        ({"mup_base_width": 64}, "'gpt2' with model.mup_base_width = 64: muP, and only muP"),
        (
            {"mup_base_head_width": 16},
            "mup_base_head_width = 16 has no effect with model.initialization = 'gpt2'",
        ),
    ],
)
def test_incomplete_mup_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate(fields)
    assert message in str(error.value)
