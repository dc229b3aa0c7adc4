"""The [model] table: every variant of the network that the papers describe. Torch-free.

Combinations without a meaning are refused here, where all the fields are known, before a job is queued.
"""

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Section
from gpt.config.attention_kernels import ATTENTION_KERNELS, KernelSpec, kernel_spec

Count = Annotated[int, Field(ge=1)]
# The bounds are far above any published model. They refuse a mistyped size at once, because checks and plans
# take time that grows with the number of layers and heads.
Layers = Annotated[int, Field(ge=1, le=4096)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 24)]
Context = Annotated[int, Field(ge=1, le=1 << 30)]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_GATED = ("swiglu", "geglu", "reglu", "glu", "bilinear")


class RopeScaling(Section):
    """Scaling of rotary positions, for a context longer than the weights were trained with."""

    kind: Literal["linear", "yarn", "llama3"] = Field(
        description="linear (arXiv:2306.15595), yarn (arXiv:2309.00071) or llama3 (arXiv:2407.21783)."
    )
    factor: float = Field(gt=1, description="Factor by which the context grows.")
    original_context: Context | None = Field(
        default=None,
        description="Context of the original training, in tokens. Default: context / factor, rounded.",
    )
    low_frequency_factor: float = Field(
        default=1.0,
        gt=0,
        description="llama3: stretches wavelengths above original_context / this by the whole factor.",
    )
    high_frequency_factor: float = Field(
        default=4.0, gt=0, description="llama3: keeps wavelengths below original_context / this."
    )
    beta_slow: float = Field(
        default=1.0,
        gt=0,
        description="yarn: stretches dimensions with fewer turns than this in the original context.",
    )
    beta_fast: float = Field(
        default=32.0,
        gt=0,
        description="yarn: keeps dimensions with more turns than this in the original context.",
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
    """The network. The defaults are Llama's: RMSNorm, RoPE, SwiGLU, no biases, untied embeddings."""

    n_layers: Layers = Field(default=12, description="Transformer blocks.")
    d_model: Width = Field(default=768, description="Width of the residual stream.")
    n_heads: Heads = Field(default=12, description="Query heads.")
    n_kv_heads: Heads | None = Field(
        default=None,
        description="Key/value heads, a divisor of n_heads; 1 is multi-query attention. Default: n_heads.",
    )
    d_head: Width | None = Field(default=None, description="Width of a head. Default: d_model / n_heads.")
    context: Context = Field(default=1024, description="Tokens per sequence.")
    vocab_size: Vocabulary | None = Field(
        default=None, description="Rows of the token embedding. Default: the data's vocabulary, padded."
    )
    vocab_multiple: Vocabulary = Field(
        default=64, description="The data's vocabulary is padded to a multiple of this."
    )
    ffn: Literal["swiglu", "geglu", "reglu", "glu", "bilinear", "swish", "gelu", "relu", "relu2"] = Field(
        default="swiglu",
        description="Feed-forward variant (Shazeer 2020); relu2 is that of Primer (So et al. 2021).",
    )
    d_ff: Width | None = Field(
        default=None,
        description="Hidden width of the feed-forward. Default: 4 × d_model, or 2/3 of that for gated "
        "variants, rounded up to a multiple of 64.",
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="Normalisation layer.")
    norm_placement: Literal["pre", "post"] = Field(
        default="pre",
        description="pre computes x + f(norm(x)) (GPT-2), post norm(x + f(x)) (Vaswani et al. 2017).",
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the variance before its root.")
    qk_norm: bool = Field(
        default=False, description="Applies RMSNorm to each head's queries and keys, before the rotation."
    )
    position: Literal["rope", "learned", "sinusoidal", "none"] = Field(
        default="rope", description="Position encoding."
    )
    rope_theta: float = Field(default=10_000.0, gt=1, description="Base of the rotary wavelengths.")
    rope_scaling: RopeScaling | None = Field(default=None, description="Rotary scaling for long contexts.")
    bias: bool = Field(default=False, description="Adds biases to every linear layer and LayerNorm (GPT-2).")
    tie_embeddings: bool = Field(default=False, description="Uses the token embedding as the output head.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout probability on embeddings, attention weights and the output of each sublayer.",
    )
    window: Count | None = Field(
        default=None, description="Tokens that a token attends to, itself included. Default: all before it."
    )
    attention_softcap: float | None = Field(
        default=None, gt=0, description="c in c · tanh(x / c) on attention scores (Gemma 2). Default: off."
    )
    logit_softcap: float | None = Field(
        default=None, gt=0, description="c in c · tanh(x / c) on output logits (Gemma 2). Default: off."
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Weight of (log Z)² in the training loss and in train/loss (PaLM: 1e-4). 0: off.",
    )
    initialization: Literal["gpt2", "llama", "mup"] = Field(
        default="gpt2",
        description="Initial weights: gpt2 (Radford et al. 2019), llama (torchtitan's Llama 3), or mup (Yang "
        "et al. 2022), with which learning rates transfer from a narrow model to a wide one.",
    )
    mup_base_width: Width | None = Field(
        default=None, description="mup: d_model of the narrow model on which the learning rate was tuned."
    )
    mup_base_head_width: Width | None = Field(
        default=None, description="mup: head width of that model. Default: the head width of this one."
    )
    attention: str = Field(
        default="auto",
        json_schema_extra={"enum": ["auto", *(kernel.name for kernel in ATTENTION_KERNELS)]},
        description="Attention kernel. auto chooses by device, dtype, head width, dropout and soft-cap.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass recomputes to save memory: nothing, each block except its matrix "
        "products, or each block (activation checkpointing). The numbers are the same.",
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
        """Whether the feed-forward has a gate: three matrices instead of two."""
        return self.ffn in _GATED

    @property
    def ffn_width(self) -> int:
        """d_ff after the default. Shazeer's 2/3 rule gives all variants the same number of parameters."""
        if self.d_ff is not None:
            return self.d_ff
        width = 4 * self.d_model * 2 / 3 if self.is_gated else 4 * self.d_model
        return ceil(width / 64) * 64

    @property
    def width_ratio(self) -> float:
        """d_model over that of the network on which the learning rate was tuned; 1 without muP."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def attention_scale(self) -> float | None:
        """Factor of q·k; None is 1/√E.

        muP (arXiv:2203.03466, table 8): proportional to 1/E, and 1/√E at the base width.
        """
        base = self.mup_base_head_width
        return None if base in (None, self.head_width) else base**0.5 / self.head_width

    @property
    def vocabulary(self) -> int:
        """vocab_size of a resolved config. Raises ValueError when it is not resolved."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not resolved")
        return self.vocab_size

    @field_validator("attention")
    @classmethod
    def _kernel_is_known(cls, name: str) -> str:
        if name != "auto" and kernel_spec(name) is None:
            known = ", ".join(kernel.name for kernel in ATTENTION_KERNELS)
            raise ValueError(f"model.attention = {name!r} is not a kernel. Known: auto, {known}.")
        return name

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
                f"{self.mup_base_width}: muP, and only muP, needs the d_model of the model on which the "
                "learning rate was tuned."
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
                "Remove it, or set a smaller one."
            )
        if self.attention_softcap and self.dropout:
            raise ValueError(
                f"model.attention_softcap = {self.attention_softcap:g} with model.dropout = "
                f"{self.dropout:g}: no kernel combines them. Set one of them to its default."
            )
        kernel = kernel_spec(self.attention)
        if kernel is not None and (problem := self.unsupported_by(kernel)) is not None:
            others = [other.name for other in ATTENTION_KERNELS if self.unsupported_by(other) is None]
            raise ValueError(
                f"model.attention = {self.attention!r} cannot compute this model: {problem}. "
                f"Use one of: auto, {', '.join(others)}."
            )
        return self

    def unsupported_by(self, kernel: KernelSpec) -> str | None:
        """What `kernel` lacks for this model on any device, or None."""
        return kernel.unsupported(
            head_width=self.head_width, softcap=self.attention_softcap, dropout=self.dropout
        )


def nearest_multiple(value: int, unit: int) -> int:
    """The multiple of `unit` nearest to `value`, at least one."""
    return max(1, round(value / unit)) * unit
