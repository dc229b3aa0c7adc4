"""Maps a model to the transformers architecture that computes the same function: config and tensors.

Export and import use the same table of (their tensor, our tensor, rows, transposed). This module touches no
tensor and does not import transformers. `config_json` reads the config of such an architecture.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_table

# The names in transformers.activations.ACT2FN of Shazeer's activations; GPT-2's GELU is the tanh form.
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}
PLAIN = {"gelu": "gelu_pytorch_tanh", "relu": "relu", "swish": "silu", "relu2": "relu2"}


@dataclass(frozen=True)
class TensorPlace:
    """Tensor `theirs` of transformers is `factor` times rows `start` to `end` of `ours`, maybe transposed."""

    theirs: str
    ours: str
    start: int | None = None
    end: int | None = None
    is_transposed: bool = False
    factor: float = 1.0


def twin_obstacle(model: ModelConfig) -> str | None:
    """Why no architecture of transformers computes this model, or None."""
    if model.attention_softcap or model.logit_softcap:
        return "soft-caps"
    if model.norm_placement == "post":
        return "norm_placement = 'post'"
    if model.position in ("sinusoidal", "none"):
        return f"position = {model.position!r}"
    if model.position == "learned":
        fits = {
            "norm = 'rmsnorm'": model.norm == "layernorm",
            "bias = false": model.bias,
            f"ffn = {model.ffn!r}": not model.is_gated,
            "grouped-query attention": model.kv_heads == model.n_heads,
            "d_head": model.head_width * model.n_heads == model.d_model,
            "qk_norm": not model.qk_norm,
            "window": model.window is None,
            "mup_base_head_width": model.attention_scale is None,
        }
        return _first(fits, "with learned positions")
    fits = {"norm = 'layernorm'": model.norm == "rmsnorm", f"ffn = {model.ffn!r}": model.is_gated}
    if _is_mistrals(model) or model.qk_norm:
        fits["bias = true with qk_norm, a window or a width that n_heads does not divide"] = not model.bias
    return _first(fits, "with rotary positions")


def _is_mistrals(model: ModelConfig) -> bool:
    """Whether Llama's class refuses the model: it has a window, or n_heads does not divide the width."""
    return model.window is not None or model.d_model % model.n_heads != 0


def _first(fits: dict[str, bool], where: str) -> str | None:
    return next((f"{what} {where}" for what, fit in fits.items() if not fit), None)


def twin_config(model: ModelConfig, dtype: str, end_of_text: int) -> dict[str, Any]:
    """The config.json for `model`: GPT-2, Llama, Mistral (`_is_mistrals`) or Qwen3 (QK-norm)."""
    assert twin_obstacle(model) is None
    common = {
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
    }
    if model.position == "learned":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": model.context,
            "n_embd": model.d_model,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "n_inner": model.ffn_width,
            "activation_function": PLAIN[model.ffn],
            "layer_norm_epsilon": model.norm_eps,
            **{f"{part}_pdrop": model.dropout for part in ("resid", "embd", "attn")},
            **common,
        }
    config = {
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": GATES[model.ffn],
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # transformers before version 5 reads this key
        "rope_parameters": _rope_parameters(model),
        **common,
    }
    if model.qk_norm:
        window = {"sliding_window": model.window, "use_sliding_window": model.window is not None}
        # Qwen3 applies its window from this layer onwards
        window["max_window_layers"] = 0
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config, **window}
    if _is_mistrals(model):
        window = {"sliding_window": model.window}
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **config, **window}
    biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config, **biases}


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    parameters = {
        "rope_type": scaling.kind,
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
    }
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        parameters |= {"low_freq_factor": low, "high_freq_factor": high}
    elif scaling.kind == "yarn":
        parameters |= {"beta_slow": scaling.beta_slow, "beta_fast": scaling.beta_fast}
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.context_before(model.context)
    return parameters


def tensor_places(model: ModelConfig) -> Iterator[TensorPlace]:
    """Every tensor of an export and its place in our parameters, in the order of our parameters.

    The names are those of Outlast when transformers has no architecture for the model.
    """
    if twin_obstacle(model) is not None:
        return (TensorPlace(name, name) for name, _ in parameter_table(model))
    return _gpt2_places(model) if model.position == "learned" else _llama_places(model)


def _gpt2_places(model: ModelConfig) -> Iterator[TensorPlace]:
    yield TensorPlace("transformer.wte.weight", "embedding.weight")
    yield TensorPlace("transformer.wpe.weight", "position.weight")
    for i in range(model.n_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        yield from _both(f"{theirs}.ln_1", f"{ours}.attention_norm")
        # transformers' Conv1D stores [in, out]
        yield from _both(f"{theirs}.attn.c_attn", f"{ours}.attention.qkv", is_transposed=True)
        yield from _both(f"{theirs}.attn.c_proj", f"{ours}.attention.output", is_transposed=True)
        yield from _both(f"{theirs}.ln_2", f"{ours}.ffn_norm")
        yield from _both(f"{theirs}.mlp.c_fc", f"{ours}.ffn.up", is_transposed=True)
        yield from _both(f"{theirs}.mlp.c_proj", f"{ours}.ffn.down", is_transposed=True)
    yield from _both("transformer.ln_f", "final_norm", factor=1 / model.width_ratio)
    if not model.tie_embeddings:
        yield TensorPlace("lm_head.weight", "head.weight")


def _llama_places(model: ModelConfig) -> Iterator[TensorPlace]:
    q, kv, f = model.n_heads * model.head_width, model.kv_heads * model.head_width, model.ffn_width
    # muP's factors for scores and logits are folded into tensors where they change nothing else
    scale = (model.attention_scale or model.head_width**-0.5) * model.head_width**0.5
    q_scale, norm_scale = (1.0, scale) if model.qk_norm else (scale, 1.0)
    kinds = ("weight", "bias") if model.bias else ("weight",)
    yield TensorPlace("model.embed_tokens.weight", "embedding.weight")
    for i in range(model.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        attention, ffn = f"{theirs}.self_attn", f"{theirs}.mlp"
        yield TensorPlace(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        for kind in kinds:
            qkv = f"{ours}.attention.qkv.{kind}"
            yield TensorPlace(f"{attention}.q_proj.{kind}", qkv, 0, q, factor=q_scale)
            yield TensorPlace(f"{attention}.k_proj.{kind}", qkv, q, q + kv)
            yield TensorPlace(f"{attention}.v_proj.{kind}", qkv, q + kv, q + 2 * kv)
            yield TensorPlace(f"{attention}.o_proj.{kind}", f"{ours}.attention.output.{kind}")
        if model.qk_norm:
            query_norm = f"{ours}.attention.query_norm.weight"
            yield TensorPlace(f"{attention}.q_norm.weight", query_norm, factor=norm_scale)
            yield TensorPlace(f"{attention}.k_norm.weight", f"{ours}.attention.key_norm.weight")
        yield TensorPlace(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight")
        for kind in kinds:
            yield TensorPlace(f"{ffn}.gate_proj.{kind}", f"{ours}.ffn.up.{kind}", 0, f)
            yield TensorPlace(f"{ffn}.up_proj.{kind}", f"{ours}.ffn.up.{kind}", f, 2 * f)
            yield TensorPlace(f"{ffn}.down_proj.{kind}", f"{ours}.ffn.down.{kind}")
    yield TensorPlace("model.norm.weight", "final_norm.weight", factor=1 / model.width_ratio)
    if not model.tie_embeddings:
        yield TensorPlace("lm_head.weight", "head.weight")


def _both(
    theirs: str, ours: str, *, is_transposed: bool = False, factor: float = 1.0
) -> Iterator[TensorPlace]:
    yield TensorPlace(f"{theirs}.weight", f"{ours}.weight", is_transposed=is_transposed, factor=factor)
    yield TensorPlace(f"{theirs}.bias", f"{ours}.bias", factor=factor)
