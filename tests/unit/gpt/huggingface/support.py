"""Folders in transformers' own layout, with random weights and our packaged tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_pipeline.tokenizer.encoding import load_encoding
from gpt.huggingface.tokenizer import write_tokenizer

SMALL = {"vocab_size": 4096, "bos_token_id": 4095, "eos_token_id": 4095}
GPT2_JSON = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
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


def save(kind: str, fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    """A model with random weights in transformers' own layout, with our packaged tokenizer."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(folder)
    write_tokenizer(load_encoding("outlast-4k"), 32, folder)
    return theirs
