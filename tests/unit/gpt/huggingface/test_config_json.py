"""config.json files: what is read, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from data_pipeline.errors import ConfigError
from gpt.huggingface.config_json import end_ids, model_fields, read_config
from tests.unit.gpt.huggingface.support import GPT2_JSON, LLAMA, QWEN3, YARN


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert"},
            "model_type = 'bert' cannot be imported. Known: gpt2, llama, mistral and qwen3",
        ),
        ({**LLAMA, "model_type": "llama", "hidden_act": "mish"}, "hidden_act = 'mish'. Known: silu, gelu"),
        (
            {**LLAMA, "model_type": "llama", "mlp_bias": True, "attention_bias": False},
            "attention_bias = False",
        ),
        ({**LLAMA, "model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {**GPT2_JSON, "model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True; Outlast supports only False",
        ),
        (
            {**QWEN3, "use_sliding_window": True, "max_window_layers": 1},
            "sliding window in 1 of 2 layers. Outlast supports one in all",
        ),
        (
            {**QWEN3, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding window in 1 of 2 layers. Outlast supports one in all",
        ),
        ({**QWEN3, "attention_bias": True}, "asks for bias = true with qk_norm, a window"),
        (
            {**LLAMA, "model_type": "llama", "rope_parameters": {**YARN, "attention_factor": 1.0}},
            "attention_factor = 1.0 for its rotary positions; Outlast has no such setting",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.kind = 'dynamic': input should be 'linear', 'yarn' or 'llama3'",
        ),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2}, "config.json lacks vocab_size, n_head, n_posit"),
        ({**LLAMA, "model_type": "mistral"}, "config.json lacks sliding_window, and mistral has no"),
        ({"model_type": "outlast", "model": {"n_layers": 0}}, "n_layers = 0: input should be greater than"),
        ({**LLAMA, "model_type": "llama", "num_key_value_heads": 3}, "n_kv_heads = 3 does not divide"),
        ({"model_type": "outlast", "model": 3}, "model = 3: input should be a valid dictionary"),
        ({"model_type": ["llama"]}, "model_type = ['llama'] cannot be imported"),
        (
            {**LLAMA, "model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
            "quantization_config = {'quant_method': 'fp8'}. The weights are quantized. Save the",
        ),
        (
            {**LLAMA, "model_type": "llama", "transformers_weights": "x.safetensors"},
            "transformers_weights = 'x.safetensors'. Name the file model.safetensors",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_parameters": "default"},
            "rope_parameters = 'default': input should be a valid dictionary",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_parameters": YARN, "rope_scaling": {"type": "linear"}},
            "rope_scaling and rope_parameters differ",
        ),
        (
            {**LLAMA, "model_type": "llama", "num_hidden_layers": 10**9},
            "num_hidden_layers = 1000000000: input should be less than or equal to 4096",
        ),
        ({**LLAMA, "model_type": "llama", "num_attention_heads": 10**9}, "num_attention_heads = 1000000000"),
        ({**GPT2_JSON, "model_type": "gpt2", "n_embd": 10**9}, "n_embd = 1000000000: input should be less"),
        ({**GPT2_JSON, "model_type": "gpt2", "n_layer": "2"}, "n_layer = '2': input should be a valid int"),
        ({**GPT2_JSON, "model_type": "gpt2", "n_layer": True}, "n_layer = True: input should be a valid int"),
        (
            {**GPT2_JSON, "model_type": "gpt2", "n_layer": 2.0},
            "n_layer = 2.0: input should be a valid integer",
        ),
        ({**GPT2_JSON, "model_type": "gpt2", "n_layer": None}, "n_layer = None: input should be a valid int"),
        ({**GPT2_JSON, "model_type": "gpt2", "tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        (
            {**LLAMA, "model_type": "llama", "rms_norm_eps": float("nan")},
            "rms_norm_eps = nan: input should be a finite number",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_theta": float("inf")},
            "rope_theta = inf: input should be a finite number",
        ),
        (
            {**QWEN3, "layer_types": "full_attention"},
            "layer_types = 'full_attention': input should be a valid",
        ),
    ],
)
def test_unsupported_architecture_or_setting_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_fields(config)
    assert message in str(error.value)


def test_defaults_for_absent_keys_are_those_of_transformers() -> None:
    yarn = {name: value for name, value in YARN.items() if "original" not in name}
    theirs = AutoConfig.for_model("llama", **LLAMA, rope_parameters=dict(yarn)).rope_parameters
    ours = model_fields({**LLAMA, "model_type": "llama", "rope_parameters": yarn})["rope_scaling"]
    assert ours["original_context"] == theirs["original_max_position_embeddings"] == 32
    assert "window" not in model_fields({**QWEN3, "use_sliding_window": False})
    assert "window" not in model_fields({**QWEN3, "use_sliding_window": True})  # it begins at layer 28
    every = model_fields({**QWEN3, "use_sliding_window": True, "max_window_layers": 0})
    assert every["window"] == QWEN3["sliding_window"]


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rotary_scaling_by_1_is_none(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 1.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for key in ("rope_parameters", "rope_scaling"):
        fields = model_fields({**LLAMA, "model_type": "llama", key: rope})
        assert "rope_scaling" not in fields
        assert fields["rope_theta"] == 500.0
    # an independent computation of the same frequencies
    theirs = AutoConfig.for_model("llama", **LLAMA, rope_parameters=rope)
    scaled, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    plain = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    assert factor == 1.0
    torch.testing.assert_close(scaled, plain)


def test_keys_that_do_not_change_the_function_are_passed_over() -> None:
    keys = {"torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "quantization_config": None}
    nulls = {"rope_scaling": None, "head_dim": None, "attention_bias": None, "sliding_window": None}
    plain = model_fields({**LLAMA, "model_type": "llama"})
    assert model_fields({**LLAMA, "model_type": "llama", **keys, **nulls}) == plain


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json. Give a folder that transformers' save_pretrained wrote"),
        ("config.json", '{"model_type": "lla', "config.json is not readable as JSON"),
        ("config.json", "[]", "config.json holds list, not an object"),
        (
            "adapter_config.json",
            "{}",
            "has an adapter_config.json, so its weights are those of the model plus",
        ),
    ],
)
def test_folder_without_a_whole_model_is_refused(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if name != "config.json":
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama"}))
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)


def test_ends_of_a_text_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_ids(tmp_path) == {"config.json": (2,)}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert list(end_ids(tmp_path).items()) == [("generation_config.json", (3, 4)), ("config.json", (2,))]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(
        ConfigError, match=r"generation_config.json: eos_token_id.* = '</s>': input should be"
    ):
        end_ids(tmp_path)
