"""Folders that transformers wrote, read into runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_pipeline.errors import ConfigError
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.config.run import RunConfig
from gpt.huggingface.architectures import model_fields
from gpt.huggingface.importer import PretrainedFolder, check_tokenizer
from gpt.huggingface.load_model import from_run
from gpt.huggingface.tokenizer import write_tokenizer
from gpt.run import record
from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from launcher.cli import run as outlast
from tests.unit.data_pipeline.support import packaged_texts, prepared
from tests.unit.gpt.model.support import random_tokens, rows

SMALL = {"vocab_size": 4096, "bos_token_id": 4095, "eos_token_id": 4095}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "sliding_window": 4}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    ("llama", LLAMA),
    ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {**LLAMA, "rope_parameters": YARN, "hidden_act": "gelu"}),
    ("mistral", {**LLAMA, "sliding_window": 7, "head_dim": 10}),
    ("mistral", {**LLAMA, "sliding_window": 4096}),
    ("qwen3", {**LLAMA, "head_dim": 16}),
]


def save(kind: str, fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    """A model with random weights in transformers' own layout, with our packaged tokenizer."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(folder)
    write_tokenizer(load_encoding("outlast-4k"), 32, folder)
    return theirs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    prepared(folder, packaged_texts(), val_fraction=0.1)
    return folder


@pytest.mark.parametrize(("kind", "fields"), MODELS)
def test_imported_weights_give_the_logits_of_transformers(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    from gpt.config.model import ModelConfig
    from gpt.model.gpt import GPT

    theirs = save(kind, fields, tmp_path)
    model = ModelConfig.model_validate(model_fields(read_json(tmp_path / "config.json") or {}))
    folder, gpt = PretrainedFolder(tmp_path, model), GPT(model)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(torch.from_numpy(folder.parameter(name, tuple(parameter.shape))))
        gpt.place(torch.device("cpu"), torch.float32)
        tokens = random_tokens(2, 32)
        assert (gpt.logits(tokens, rows(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4


def test_import_command_creates_a_run_with_the_weights_at_step_0(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = save("llama", LLAMA, tmp_path / "hf")
    options = [
        "--data",
        str(data),
        "--set",
        "schedule.total_steps=3",
        "--set",
        "batch.global_batch_tokens=512",
    ]
    assert outlast(["import", str(tmp_path / "hf"), str(tmp_path / "run"), *options]) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    trained = from_run(run_dir)
    assert (trained.step, run.total_steps) == (0, 3)
    assert [(line["event"], line["step"]) for line in record.read(run_dir.events)] == [("imported", 0)]
    tokens = random_tokens(2, 32)
    with torch.no_grad():
        assert (trained.gpt.logits(tokens, rows(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4


def test_failed_import_leaves_nothing(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save("llama", LLAMA, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_bytes(b"junk" * 99)
    options = [
        "--data",
        str(data),
        "--set",
        "schedule.total_steps=3",
        "--set",
        "batch.global_batch_tokens=512",
    ]
    assert outlast(["import", str(tmp_path / "hf"), str(tmp_path / "run"), *options]) == 2
    assert "model.safetensors cannot be read" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert"},
            "model_type = 'bert' cannot be imported. Known: gpt2, llama, mistral and qwen3",
        ),
        ({**LLAMA, "model_type": "llama", "hidden_act": "mish"}, "the activation 'mish'. Known: silu, gelu"),
        (
            {**LLAMA, "model_type": "llama", "mlp_bias": True, "attention_bias": False},
            "attention_bias = False",
        ),
        ({**LLAMA, "model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {**MODELS[0][1], "model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
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


def test_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    encoding = load_encoding("outlast-4k")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        check_tokenizer(tmp_path, encoding)
    write_tokenizer(encoding, 32, tmp_path)
    check_tokenizer(tmp_path, encoding)
    text = (
        (tmp_path / "tokenizer.json").read_text().replace('"behavior": "Isolated"', '"behavior": "Removed"')
    )
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="gives other ids than the data's encoding 'outlast-4k'"):
        check_tokenizer(tmp_path, encoding)
