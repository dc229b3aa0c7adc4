"""ModelConfig: the [model] table, every variant of the network that the papers describe.

Torch-free, as the whole run config is. Combinations that have no meaning are refused here, where all the
fields are seen, before anything is queued.
"""

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_GATED = ("swiglu", "geglu", "reglu", "glu", "bilinear")


class RopeScaling(Section):
    """Rotary positions for a context longer than the one that the weights were trained with."""

    kind: Literal["linear", "yarn", "llama3"] = Field(
        description="linear: arXiv:2306.15595; yarn: arXiv:2309.00071; llama3: arXiv:2407.21783."
    )
    factor: float = Field(gt=1, description="How many times longer the context becomes.")
    original_context: Count | None = Field(
        default=None,
        description="Context of the first training, in tokens. Default: context / factor, rounded.",
    )
    low_frequency_factor: float = Field(
        default=1.0,
        gt=0,
        description="llama3: wavelengths above original_context / this are stretched fully.",
    )
    high_frequency_factor: float = Field(
        default=4.0, gt=0, description="llama3: wavelengths below original_context / this are left alone."
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="yarn: dimensions that turn less often in the context are stretched."
    )
    beta_fast: float = Field(
        default=32.0, gt=0, description="yarn: dimensions that turn more often in the context are left alone."
    )

    def context_before(self, context: int) -> int:
        """original_context after the default."""
        return self.original_context or max(1, round(context / self.factor))

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} = {getattr(self, low):g} must be below "
                    f"{high} = {getattr(self, high):g}."
                )
        return self


class ModelConfig(Section):
    """The network. Defaults are Llama's: RMSNorm, RoPE, SwiGLU, no bias, untied."""

    n_layers: Count = Field(default=12, description="Transformer blocks.")
    d_model: Count = Field(default=768, description="Width of the residual stream.")
    n_heads: Count = Field(default=12, description="Query heads.")
    n_kv_heads: Count | None = Field(
        default=None, description="Key/value heads; they divide n_heads; 1 is multi-query. Default: n_heads."
    )
    d_head: Count | None = Field(default=None, description="Width of a head. Default: d_model / n_heads.")
    context: Count = Field(default=1024, description="Tokens a sequence.")
    vocab_size: Count | None = Field(
        default=None, description="Rows of the embedding. Default: the data's vocabulary, padded."
    )
    vocab_multiple: Count = Field(
        default=64, description="A vocabulary taken from the data is padded to a multiple of this."
    )
    ffn: Literal["swiglu", "geglu", "reglu", "glu", "bilinear", "swish", "gelu", "relu", "relu2"] = Field(
        default="swiglu", description="Feed-forward variant (Shazeer 2020); relu2 is Primer's (So 2021)."
    )
    d_ff: Count | None = Field(
        default=None,
        description="Hidden width of the feed-forward. Default: 4 × d_model, or 2/3 of it where gated, "
        "rounded up to a multiple of 64.",
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="Normalisation.")
    norm_placement: Literal["pre", "post"] = Field(
        default="pre", description="pre: x + f(norm(x)), as GPT-2; post: norm(x + f(x)), as Vaswani 2017."
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the variance.")
    qk_norm: bool = Field(
        default=False, description="RMSNorm over the head width of queries and keys, before the rotation."
    )
    position: Literal["rope", "learned", "sinusoidal", "none"] = Field(
        default="rope", description="Position encoding."
    )
    rope_theta: float = Field(default=10_000.0, gt=1, description="Base of the rotary wavelengths.")
    rope_scaling: RopeScaling | None = Field(default=None, description="Rotary scaling for long contexts.")
    bias: bool = Field(default=False, description="Biases in every linear layer and LayerNorm (GPT-2).")
    tie_embeddings: bool = Field(default=False, description="The output head is the token embedding.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability, on embeddings, attention weights and what each part adds to the stream.",
    )
    window: Count | None = Field(
        default=None, description="A token attends to this many, itself included. Default: all before it."
    )
    attention_softcap: float | None = Field(
        default=None, gt=0, description="c · tanh(x / c) on attention scores (Gemma 2). Default: off."
    )
    logit_softcap: float | None = Field(
        default=None, gt=0, description="c · tanh(x / c) on the output logits (Gemma 2). Default: off."
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Weight of (log Z)² in the training loss (PaLM: 1e-4), train/loss included. 0: off.",
    )
    initialization: Literal["gpt2", "llama", "mup"] = Field(
        default="gpt2",
        description="Initial weights: gpt2 (Radford 2019); llama (torchtitan's Llama 3); mup (Yang 2022), "
        "with learning rates that carry over from a narrow model to a wide one.",
    )
    mup_base_width: Count | None = Field(
        default=None, description="mup: d_model of the narrow model for which the learning rate was tuned."
    )
    mup_base_head_width: Count | None = Field(
        default=None, description="mup: head width of that model. Default: the same as here."
    )
    attention: Literal["auto", "flash-4", "flash-3", "flash-2", "sdpa", "reference"] = Field(
        default="auto", description="Attention kernel; auto picks by hardware, dtype, head width and mask."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass computes again to save memory: nothing; a block but its matrix "
        "products; a whole block (activation checkpointing). The numbers are the same.",
    )

    @property
    def head_width(self) -> int:
        """Width of one head after the default."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads after the default."""
        return self.n_kv_heads or self.n_heads

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a gate (three matrices instead of two)."""
        return self.ffn in _GATED

    @property
    def ffn_width(self) -> int:
        """d_ff after the default: Shazeer's 2/3 rule keeps the parameters of gated variants equal."""
        if self.d_ff is not None:
            return self.d_ff
        width = 4 * self.d_model * 2 / 3 if self.is_gated else 4 * self.d_model
        return ceil(width / 64) * 64

    @property
    def width_ratio(self) -> float:
        """How many times wider the network is than the one its learning rate was tuned for; 1 without muP."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def attention_scale(self) -> float | None:
        """Factor of q·k; None is 1/√E. muP (arXiv:2203.03466, table 8): ∝ 1/E, and 1/√E at the base width."""
        base = self.mup_base_head_width
        return None if base in (None, self.head_width) else base**0.5 / self.head_width

    @property
    def vocabulary(self) -> int:
        """vocab_size of a resolved config."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not resolved")
        return self.vocab_size

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model = {self.d_model} is not a multiple of model.n_heads = {self.n_heads}. "
                f"Nearest: {nearest_multiple(self.d_model, self.n_heads)}; or set model.d_head."
            )
        if self.n_heads % self.kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ValueError(
                f"model.n_kv_heads = {self.kv_heads} does not divide model.n_heads = {self.n_heads}. "
                f"These do: {', '.join(map(str, divisors))}."
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(
                f"model.position = 'rope' needs an even head width; it is {self.head_width} "
                f"(d_model {self.d_model}, n_heads {self.n_heads}, d_head {self.d_head})."
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"model.position = 'sinusoidal' needs an even d_model; it is {self.d_model}.")
        if self.position != "rope" and (self.rope_scaling or self.rope_theta != 10_000.0):
            field = "rope_scaling" if self.rope_scaling else "rope_theta"
            raise ValueError(
                f"model.{field} has no effect with model.position = {self.position!r}; remove it, or set "
                "model.position = 'rope'."
            )
        return self

    @model_validator(mode="after")
    def _initialization_fits(self) -> Self:
        if (self.initialization == "mup") != (self.mup_base_width is not None):
            raise ValueError(
                f"model.initialization = {self.initialization!r} with model.mup_base_width = "
                f"{self.mup_base_width}: muP, and only muP, needs the d_model of the model whose learning "
                "rate this one takes over."
            )
        if self.mup_base_head_width is not None and self.initialization != "mup":
            raise ValueError(
                f"model.mup_base_head_width = {self.mup_base_head_width} has no effect with "
                f"model.initialization = {self.initialization!r}; remove it."
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if self.window is not None and self.window >= self.context:
            raise ValueError(
                f"model.window = {self.window} has no effect: the context has {self.context} tokens. "
                "Remove it, or make it smaller."
            )
        if self.attention == "sdpa" and self.attention_softcap:
            raise ValueError(
                f"model.attention_softcap = {self.attention_softcap:g}: torch's kernel, model.attention = "
                "'sdpa', has no soft-cap. Use 'auto', 'flash-2' or 'reference'."
            )
        if self.attention_softcap and self.dropout:
            raise ValueError(
                f"model.attention_softcap = {self.attention_softcap:g} with model.dropout = "
                f"{self.dropout:g}: no kernel has both. Set one of them to its default."
            )
        if self.attention in ("flash-3", "flash-4") and self.dropout:
            raise ValueError(
                f"model.attention = {self.attention!r} has no dropout, and model.dropout = {self.dropout:g}. "
                "Use 'auto' or 'flash-2'."
            )
        if self.attention.startswith("flash") and (self.head_width > 256 or self.head_width % 8):
            raise ValueError(
                f"model.attention = {self.attention!r} needs a head width that is a multiple of 8 up to 256; "
                f"it is {self.head_width}. Use 'auto'."
            )
        return self


def nearest_multiple(value: int, unit: int) -> int:
    """The multiple of `unit` nearest to `value`, at least one."""
    return max(1, round(value / unit)) * unit
