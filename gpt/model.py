"""The GPT: a pre-norm decoder-only Transformer.

Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762) with GPT-2's changes (Radford et al.
2019: norm before each part, a last norm, residual weights scaled by 1/√(2L)) and, by default, Llama's:
RMSNorm, rotary positions, SwiGLU, no biases.

    # B batch, T tokens, D model width, H query heads, K key/value heads, E head width, V vocabulary
"""

import math

import torch
from torch import Tensor, nn

from gpt.attention import Attention, Documents, choose
from gpt.config import ModelConfig
from gpt.layers import FeedForward, Linear, build_norm, rope_table, rotate
from gpt.loss import cross_entropy_sum


class SelfAttention(nn.Module):
    """Multi-head (Vaswani et al. 2017, section 3.2.2) or grouped-query (arXiv:2305.13245) attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.n_heads, model.kv_heads, model.head_width
        rows = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(model.d_model, rows, bias=model.bias)
        self.output = Linear(self.heads * self.head_width, model.d_model, bias=model.bias)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor] | None, documents: Documents, attend: Attention
    ) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        b, t, _ = x_btd.shape
        qkv = self.qkv(x_btd).view(b, t, self.heads + 2 * self.kv_heads, self.head_width)
        q_bthe, k_btke, v_btke = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if rope is not None:
            q_bthe, k_btke = rotate(q_bthe, *rope), rotate(k_btke, *rope)
        # [B, T, H, E] → [B·T, H, E]: documents are ranges of the flattened tokens
        out = attend(q_bthe.flatten(0, 1), k_btke.flatten(0, 1), v_btke.flatten(0, 1), documents)
        mixed: Tensor = self.output(out.reshape(b, t, -1))
        return mixed


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(model)
        self.attention = SelfAttention(model)
        self.ffn_norm = build_norm(model)
        self.ffn = FeedForward(model)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor] | None, documents: Documents, attend: Attention
    ) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), rope, documents, attend)
        fed_btd: Tensor = self.ffn(self.ffn_norm(x_btd))
        return x_btd + fed_btd


class GPT(nn.Module):
    """The network. `forward` gives the summed loss, `logits` the scores of the next token."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocabulary, model.d_model)
        self.position = nn.Embedding(model.context, model.d_model) if model.position == "learned" else None
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.n_layers))
        self.final_norm = build_norm(model)
        self.head = Linear(model.d_model, model.vocabulary, bias=False)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.attention_name = ""
        self._attend: Attention | None = None
        # Plain attributes, not buffers: a cast to bf16 must leave the angles in fp32.
        self._rope = (
            rope_table(model.context, model.head_width, model.rope_theta)
            if model.position == "rope"
            else None
        )

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """GPT-2's initial weights (Radford et al. 2019, section 2.3), a pure function of `seed`.

        N(0, 0.02²) for matrices and embeddings, the two that write to the residual stream scaled by
        1/√(2L); zero biases; unit norms.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.model.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
                parameter.normal_(0.0, residual_std if is_residual else 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)

    def place(self, device: torch.device, dtype: torch.dtype) -> "GPT":
        """Move to `device` and `dtype` and choose the attention kernel there."""
        name, attend = choose(self.model.attention, device, dtype, self.model.head_width)
        self.attention_name, self._attend = name, attend
        if self._rope is not None:
            self._rope = (self._rope[0].to(device), self._rope[1].to(device))
        return self.to(device=device, dtype=dtype)

    def hidden(self, tokens_bt: Tensor, documents: Documents) -> Tensor:
        """The last norm's output [B, T, D] for ids int64 [B, T]."""
        assert self._attend is not None, "place() comes first"
        t = tokens_bt.shape[1]
        x_btd = self.embedding(tokens_bt)
        if self.position is not None:
            x_btd = x_btd + self.position(positions(documents, tokens_bt))
        rope = None if self._rope is None else (self._rope[0][:t], self._rope[1][:t])
        for block in self.blocks:
            x_btd = block(x_btd, rope, documents, self._attend)
        normed: Tensor = self.final_norm(x_btd)
        return normed

    def logits(self, tokens_bt: Tensor, documents: Documents) -> Tensor:
        """Scores of the next token [B, T, V]."""
        scores: Tensor = self.head(self.hidden(tokens_bt, documents))
        return scores

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor, documents: Documents) -> Tensor:
        """Summed cross-entropy in nats of `targets_bt`, int64 [B, T], IGNORED where not scored."""
        return cross_entropy_sum(self.logits(tokens_bt, documents).flatten(0, 1), targets_bt.flatten())


def positions(documents: Documents, tokens_bt: Tensor) -> Tensor:
    """Distance of each token from the start of its document, int64 [B, T]."""
    starts = documents.cumulative_n1[:-1].long()
    lengths = documents.cumulative_n1.diff().long()
    place = torch.arange(tokens_bt.numel(), device=tokens_bt.device)
    return (place - starts.repeat_interleave(lengths)).view_as(tokens_bt)
