"""Folders that transformers wrote, read into runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.config.run import RunConfig
from gpt.huggingface.config_json import model_fields
from gpt.huggingface.load_model import from_run
from gpt.huggingface.pretrained_folder import PretrainedFolder
from gpt.run import record
from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir
from launcher.cli import run as outlast
from tests.unit.data_pipeline.support import packaged_texts, prepared
from tests.unit.gpt.huggingface.support import GPT2_JSON, LLAMA, YARN, save
from tests.unit.gpt.model.support import random_tokens, rows

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", GPT2_JSON),
    ("llama", LLAMA),
    ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {**LLAMA, "rope_parameters": YARN, "hidden_act": "gelu"}),
    ("mistral", {**LLAMA, "sliding_window": 7, "head_dim": 10}),
    ("mistral", {**LLAMA, "sliding_window": 4096}),
    ("qwen3", {**LLAMA, "head_dim": 16}),
]


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


def options(data: Path) -> list[str]:
    """The options of a short run."""
    short = ["--set", "schedule.total_steps=3", "--set", "batch.global_batch_tokens=512"]
    return ["--data", str(data), *short]


def test_import_command_creates_a_run_with_the_weights_at_step_0(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = save("llama", LLAMA, tmp_path / "hf")
    assert outlast(["import", str(tmp_path / "hf"), str(tmp_path / "run"), *options(data)]) == 0
    printed = capfd.readouterr()
    assert printed.out.strip() == str(tmp_path / "run")
    plan = dict(line.split("  ", 1) for line in printed.err.splitlines() if "  " in line)
    assert plan["steps"].strip() == "3"
    assert plan["tokens"].strip().startswith("1,536 (")
    assert f"start training with: outlast resume {tmp_path / 'run'}" in printed.err
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
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    command = ["import", str(tmp_path / "hf"), str(tmp_path / "run"), *options(data)]
    assert outlast([*command, "--set", "model.rope_theta=500", "--set", "model.dropout=0.1"]) == 2
    printed = capfd.readouterr().err
    assert "holds 1 numbers that are not finite in fp32, the first is nan at [3]" in printed
    changes = [line for line in printed.splitlines() if line.startswith("warning: model.")]
    assert changes == [
        "warning: model.rope_theta = 500.0, but the weights were trained with 10000.0 (config.json)."
    ]
    (tmp_path / "hf/model.safetensors").write_bytes(b"junk" * 99)
    assert outlast(command) == 2
    assert "model.safetensors cannot be read" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_import_refuses_data_of_another_vocabulary_or_end_of_text(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(tmp_path), str(tmp_path / "run"), *options(data)]
    save("llama", {**LLAMA, "eos_token_id": 0}, tmp_path)
    assert outlast(command) == 2
    assert "config.json has eos_token_id = 0. Prepare the data with the end-of-text" in capfd.readouterr().err
    save("llama", {**LLAMA, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}, tmp_path)
    assert outlast(command) == 2
    assert "A trained one, as in an import, needs data that were prepared with" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
