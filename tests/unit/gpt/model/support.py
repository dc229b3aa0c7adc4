"""Small networks for the tests, and transformers' networks with the same weights."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpt.config.model import ModelConfig
from gpt.huggingface.architectures import tensor_places, twin_config, twin_obstacle
from gpt.model.attention import Documents
from gpt.model.gpt import GPT

# The networks compute for microseconds; on a busy machine handing that to threads takes longer.
torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCABULARY = 101
GPT2: dict[str, object] = {
    "ffn": "gelu",
    "norm": "layernorm",
    "position": "learned",
    "bias": True,
    "tie_embeddings": True,
}
MUP: dict[str, object] = {"initialization": "mup", "mup_base_width": 16}


def build(attention: str = "sdpa", **fields: object) -> GPT:
    """A network of two layers in training mode, with weights that are neither zero, one nor symmetric."""
    shape = {"n_layers": 2, "d_model": 48, "n_heads": 4, "context": 24, "vocab_size": VOCABULARY}
    gpt = GPT(ModelConfig.model_validate({**shape, **fields, "attention": attention}))
    gpt.initialize(seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return gpt.place(CPU, torch.float32)


def twin_of(gpt: GPT, **fields: Any) -> PreTrainedModel:
    """transformers' network with the same weights, in evaluation mode."""
    assert twin_obstacle(gpt.model) is None
    content = twin_config(gpt.model, "float32", end_of_text=0)
    config = AutoConfig.for_model(content.pop("model_type"), **content, **fields)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = theirs.load_state_dict(in_their_layout(gpt, gradients=False), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if gpt.model.tie_embeddings else set())
    return theirs


def in_their_layout(gpt: GPT, *, gradients: bool) -> dict[str, torch.Tensor]:
    """Our parameters, or their gradients, by transformers' names."""
    tensors = {n: p.grad if gradients else p.detach() for n, p in gpt.named_parameters()}
    theirs = {}
    for place in tensor_places(gpt.model):
        tensor = tensors[place.ours]
        assert tensor is not None
        part = tensor[place.start : place.end]
        part = part / place.factor if gradients else part * place.factor
        theirs[place.theirs] = part.t() if place.is_transposed else part
    return theirs


def rows(tokens: torch.Tensor) -> Documents:
    """Documents that are the rows of `tokens`."""
    b, t = tokens.shape
    return Documents.from_ends(np.arange(t, b * t + 1, t, dtype=np.int32))


def random_tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
