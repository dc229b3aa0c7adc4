"""Networks to compare ours with: two typical hand-written ones, and transformers' Llama.

Each takes ids and targets [B, T] and returns the mean loss. All have one shape. A feed-forward with GELU
instead of SwiGLU is wider, so that its matrix products are as large.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gpt.config.model import ModelConfig


class _Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).split(d, dim=2))
        if rope is not None:
            q, k = (self._rotate(y, *rope) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _Block(nn.Module):
    """A Llama block, or with GELU and LayerNorm a GPT-2 block."""

    def __init__(self, model: ModelConfig, *, is_llama: bool) -> None:
        super().__init__()
        d, f = model.d_model, model.ffn_width
        norm = nn.RMSNorm if is_llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(d), norm(d)
        self.attention = _Attention(d, model.n_heads)
        self.is_llama = is_llama
        if is_llama:
            self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        else:
            f = 3 * f // 2
            self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rope)
        y = self.norm2(x)
        y = F.silu(self.gate(y)) * self.up(y) if self.is_llama else F.gelu(self.up(y))
        return x + self.down(y)


class HandWritten(nn.Module):
    """A minimal Llama (rotary, RMSNorm, SwiGLU), or nanoGPT's network (learned, LayerNorm, GELU)."""

    def __init__(self, model: ModelConfig, *, is_llama: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocabulary, model.d_model)
        self.position = None if is_llama else nn.Embedding(model.context, model.d_model)
        self.blocks = nn.ModuleList(_Block(model, is_llama=is_llama) for _ in range(model.n_layers))
        self.norm = (nn.RMSNorm if is_llama else nn.LayerNorm)(model.d_model)
        self.head = nn.Linear(model.d_model, model.vocabulary, bias=False)
        angle = torch.outer(
            torch.arange(model.context), 10_000.0 ** -torch.linspace(0, 1, model.head_width // 2)
        )
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.is_llama = is_llama
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        rope = (self.cos, self.sin) if self.is_llama else None
        for block in self.blocks:
            x = block(x, rope)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TransformersLlama(nn.Module):
    """LlamaForCausalLM with torch's attention, called as transformers' Trainer calls it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=model.vocabulary,
            hidden_size=model.d_model,
            intermediate_size=model.ffn_width,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            max_position_embeddings=model.context,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.llama: Any = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.llama(input_ids=tokens, labels=tokens, shift_labels=targets).loss
        return loss
