"""The GPT: a decoder-only Transformer.

Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762) with the changes of GPT-2 (Radford et al.
2019: a norm before each sublayer, a final norm, residual weights scaled by 1/√(2L)) and, by default, of
Llama: RMSNorm, rotary positions, SwiGLU, no biases.

    # B batch, T tokens, D model width, H query heads, K key/value heads, E head width, V vocabulary
"""

import math
from functools import partial
from hashlib import blake2b
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.config.model import ModelConfig
from gpt.model.attention import Attention, Documents, Scores, choose, formula
from gpt.model.compilation import require_compiler
from gpt.model.initialization import initialize
from gpt.model.layers import Embedding, FeedForward, Linear, RMSNorm, build_norm
from gpt.model.loss import BlockLoss, block_loss, capped, cross_entropy_sum
from gpt.model.positions import positions, rope_table, rotate, sinusoid_table
from gpt.model.selective_recompute import keep_products
from gpt.model.sequence_parallel import WHOLE_SEQUENCES, Attend, SequenceGroup

Rope = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Multi-head (Vaswani et al. 2017, section 3.2.2) or grouped-query (arXiv:2305.13245) attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.n_heads, model.kv_heads, model.head_width
        rows = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = Linear(model.d_model, rows, bias=model.bias)
        self.output = Linear(self.heads * self.head_width, model.d_model, bias=model.bias)
        # Henry et al. 2020 (arXiv:2010.04245); with RMSNorm as in Qwen3 (arXiv:2505.09388, section 2)
        self.query_norm = RMSNorm(model.head_width, model.norm_eps) if model.qk_norm else None
        self.key_norm = RMSNorm(model.head_width, model.norm_eps) if model.qk_norm else None

    def forward(self, x_btd: Tensor, rope: Rope | None, attend: Attend) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        b, t, _ = x_btd.shape
        qkv = self.qkv(x_btd).view(b, t, self.heads + 2 * self.kv_heads, self.head_width)
        q_bthe, k_btke, v_btke = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q_bthe, k_btke = self.query_norm(q_bthe), self.key_norm(k_btke)
        if rope is not None:
            q_bthe, k_btke = rotate(q_bthe, *rope), rotate(k_btke, *rope)
        # [B, T, H, E] → [B·T, H, E]: documents are ranges of the flattened tokens
        out = attend(q_bthe.flatten(0, 1), k_btke.flatten(0, 1), v_btke.flatten(0, 1))
        mixed: Tensor = self.output(out.reshape(b, t, -1))
        return mixed


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    pre: x + f(norm(x)) (GPT-2); post: norm(x + f(x)) (Vaswani et al. 2017, section 3.1). Dropout applies to
    f's output (section 5.4).
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(model)
        self.attention = SelfAttention(model)
        self.ffn_norm = build_norm(model)
        self.ffn = FeedForward(model)
        self.is_pre_norm = model.norm_placement == "pre"
        self.dropout = model.dropout

    def forward(self, x_btd: Tensor, rope: Rope | None, attend: Attend) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        if self.is_pre_norm:
            x_btd = x_btd + self._dropped(self.attention(self.attention_norm(x_btd), rope, attend))
            return x_btd + self._dropped(self.ffn(self.ffn_norm(x_btd)))
        x_btd = self.attention_norm(x_btd + self._dropped(self.attention(x_btd, rope, attend)))
        normed: Tensor = self.ffn_norm(x_btd + self._dropped(self.ffn(x_btd)))
        return normed

    def _dropped(self, x_btd: Tensor) -> Tensor:
        return F.dropout(x_btd, self.dropout, self.training) if self.dropout else x_btd


class Head(Linear):
    """The projection to the vocabulary, and the loss fused with it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.d_model, model.vocabulary, bias=False)
        self.softcap, self.z_loss = model.logit_softcap, model.z_loss
        self.multiplier = 1 / model.width_ratio
        self._compiled_loss: BlockLoss | None = None

    def compile_loss(self) -> None:
        """Compile the loss of a block of logits."""
        self._compiled_loss = torch.compile(block_loss)

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """[..., D] → logits [..., V]; with targets int64 [...], their summed loss (gpt.model.loss)."""
        if self.multiplier != 1.0:  # muP
            input = input * self.multiplier
        if targets is None:
            return capped(super().forward(input), self.softcap)
        return cross_entropy_sum(
            input.flatten(0, -2),
            self.weight,
            targets.flatten(),
            softcap=self.softcap,
            z_loss=self.z_loss if self.training else 0.0,
            compiled=self._compiled_loss,
        )


class Cache:
    """The keys and values of one sequence so far, [context, K, E] for each layer."""

    def __init__(self, gpt: "GPT") -> None:
        model, weight = gpt.model, gpt.embedding.weight
        shape = (model.n_layers, 2, model.context, model.kv_heads, model.head_width)
        self._kv = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0

    def attend(
        self, layer: int, prefill: Attend, scores: Scores, q_the: Tensor, k_tke: Tensor, v_tke: Tensor
    ) -> Tensor:
        """Store `k` and `v` from position `length` on, and let `q` attend to everything stored."""
        end = self.length + len(q_the)
        keys, values = self._kv[layer, 0], self._kv[layer, 1]
        keys[self.length : end], values[self.length : end] = k_tke, v_tke
        if self.length == 0:
            return prefill(q_the, k_tke, v_tke)
        return formula(q_the, keys[:end], values[:end], scores).to(q_the.dtype)


class GPT(nn.Module):
    """The network. `forward` returns the summed loss, `logits` the scores of the next token.

    The weights have no values until `initialize` or a load sets them.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = Embedding(model.vocabulary, model.d_model)
        self.position = Embedding(model.context, model.d_model) if model.position == "learned" else None
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.n_layers))
        self.final_norm = build_norm(model) if model.norm_placement == "pre" else nn.Identity()
        self.head = Head(model)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.sequence = WHOLE_SEQUENCES
        self.attention_name = ""
        self.is_compiled = False
        self._attend: Attention | None = None
        self._over_documents = _over_documents
        # Plain attributes, not buffers: casting the network to bf16 must leave the angles in fp32.
        self._rope: Rope | None = None
        self._sinusoid_td: Tensor | None = None

    def initialize(self, seed: int) -> None:
        """Draw the initial weights of model.initialization, a pure function of `seed`."""
        initialize(self.named_parameters(), self.model, seed)

    def place(
        self, device: torch.device, dtype: torch.dtype, sequence: SequenceGroup = WHOLE_SEQUENCES
    ) -> "GPT":
        """Move to `device` and `dtype`, and choose the attention kernel. Returns self.

        `sequence` is the group of ranks that share sequences. Weights on the meta device stay there: at ZeRO
        stage 3 gpt.distributed.zero creates them one by one.
        """
        model = self.model
        self.sequence = sequence
        self.attention_name, self._attend = choose(model, device, dtype)
        if model.position == "rope":
            cos, sin = rope_table(model)
            self._rope = (cos.to(device), sin.to(device))
        if model.position == "sinusoidal":
            self._sinusoid_td = sinusoid_table(model.context, model.d_model).to(device)
        return self if self.embedding.weight.is_meta else self.to(device=device, dtype=dtype)

    def compile_parts(self, *, whole_rows: bool = False) -> None:
        """Compile the blocks and the loss with torch.compile, in place; names and weights stay the same.

        All blocks share one compilation. With `whole_rows` every row is one document, and attention is
        compiled too; otherwise documents differ from step to step, and attention stays outside. Raises
        ConfigError if no compiler is found.
        """
        require_compiler()
        if not whole_rows or self.sequence.size > 1:
            # Every new set of documents would be compiled again. As a decorator at import this would load
            # the compiler, which costs a second of every start.
            self._over_documents = torch.compiler.disable(_over_documents)  # type: ignore[no-untyped-call]
        self.is_compiled = True
        for block in self.blocks:
            block.compile()
        self.head.compile_loss()

    def hidden(self, tokens_bt: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """The last block's output, normalised, [B, T, D] for ids int64 [B, T].

        Ranks that share sequences each return their own tokens only. With a cache, the one row continues the
        cached document and is added to the cache.
        """
        assert self._attend is not None, "call place() first"
        start = 0 if cache is None else cache.length
        end = start + tokens_bt.shape[1]
        scores = Scores.of(self.model, is_training=self.training)
        dense = partial(self._over_documents, self._attend, documents, scores, self.sequence, len(tokens_bt))
        mine = self.sequence.columns(tokens_bt.shape[1])
        here = slice(start + mine.start, start + mine.stop)
        rope = None if self._rope is None else (self._rope[0][here], self._rope[1][here])
        x_btd = self._embedded(tokens_bt[:, mine], start + positions(documents, tokens_bt)[:, mine])
        for layer, block in enumerate(self.blocks):
            attend = dense if cache is None else partial(cache.attend, layer, dense, scores)
            x_btd = self._run(block, x_btd, rope, attend)
        if cache is not None:
            cache.length = end
        normed: Tensor = self.final_norm(x_btd)
        return normed

    def _embedded(self, tokens_bt: Tensor, positions_bt: Tensor) -> Tensor:
        x_btd: Tensor = self.embedding(tokens_bt)
        if self.position is not None:
            x_btd = x_btd + self.position(positions_bt)
        if self._sinusoid_td is not None:  # √D: Vaswani et al. 2017, section 3.4
            scaled = x_btd.float() * math.sqrt(self.model.d_model)
            x_btd = (scaled + self._sinusoid_td[positions_bt]).to(x_btd.dtype)
        return F.dropout(x_btd, self.model.dropout, self.training) if self.model.dropout else x_btd

    def _run(self, block: nn.Module, x_btd: Tensor, rope: Rope | None, attend: Attend) -> Tensor:
        """The output of one block; model.recompute says what the backward pass recomputes."""
        if self.model.recompute == "none" or not torch.is_grad_enabled():
            return cast(Tensor, block(x_btd, rope, attend))
        if self.model.recompute == "full":
            return cast(Tensor, checkpoint(block, x_btd, rope, attend, use_reentrant=False))
        kept = checkpoint(block, x_btd, rope, attend, use_reentrant=False, context_fn=keep_products)
        return cast(Tensor, kept)

    def logits(self, tokens_bt: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """Scores of the next token [B, T, V]."""
        scores: Tensor = self.head(self.hidden(tokens_bt, documents, cache))
        return scores

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor, documents: Documents) -> Tensor:
        """Summed cross-entropy in nats of `targets_bt`, int64 [B, T], with IGNORED for unscored positions.

        Ranks that share sequences all take the same whole rows, and each returns the sum over its own tokens.
        """
        mine = self.sequence.columns(tokens_bt.shape[1])
        loss: Tensor = self.head(self.hidden(tokens_bt, documents), targets_bt[:, mine])
        return loss


def _over_documents(
    attend: Attention,
    documents: Documents,
    scores: Scores,
    sequence: SequenceGroup,
    rows: int,
    q_xhe: Tensor,
    k_xke: Tensor,
    v_xke: Tensor,
) -> Tensor:
    def over_whole(q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor) -> Tensor:
        return attend(q_xhe, k_xke, v_xke, documents, scores)

    return sequence.attend(over_whole, rows, q_xhe, k_xke, v_xke)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch's generator, so that dropout depends on these three alone."""
    digest = blake2b(f"dropout {seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)
