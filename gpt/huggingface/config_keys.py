"""The keys of config.json that describe GPT-2, Llama, Mistral or Qwen3, as the [model] table of a run.

A key is read with the type that transformers gives it. Keys without a field here are ignored, as
transformers passes over keys that its class does not have. Torch-free.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.errors import ConfigError
from gpt.config.model import Context, Heads, Layers, Vocabulary, Width
from gpt.huggingface.architectures import GATES, PLAIN

Positive = Annotated[float, Field(gt=0)]


class JsonKeys(BaseModel):
    """Keys of a JSON file. A number in a string, a fraction for a count, NaN and infinity are errors."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Gpt2Keys(JsonKeys):
    """GPT-2."""

    vocab_size: Vocabulary
    n_embd: Width
    n_layer: Layers
    n_head: Heads
    n_positions: Context
    n_inner: Width | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    tie_word_embeddings: bool = True

    def fields(self) -> dict[str, Any]:
        """The [model] table."""
        # two names of one function
        activation = self.activation_function.replace("gelu_new", "gelu_pytorch_tanh")
        return {
            "n_layers": self.n_layer,
            "d_model": self.n_embd,
            "n_heads": self.n_head,
            "d_ff": self.n_inner or 4 * self.n_embd,
            "context": self.n_positions,
            "vocab_size": self.vocab_size,
            "norm_eps": self.layer_norm_epsilon,
            "ffn": _named(PLAIN, "activation_function", activation),
            "norm": "layernorm",
            "position": "learned",
            "bias": True,
            "tie_embeddings": self.tie_word_embeddings,
        }


class RopeKeys(JsonKeys):
    """Rotary positions; older files say `type` for `rope_type`."""

    model_config = ConfigDict(extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Context | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_slow: Positive | None = None
    beta_fast: Positive | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What the file says; older and newer names of the kind are one."""
        given = self.model_dump(exclude_none=True)
        return {"rope_type" if name == "type" else name: value for name, value in given.items()}

    @property
    def unknown(self) -> dict[str, Any]:
        """Keys that no field reads."""
        return self.__pydantic_extra__ or {}

    @property
    def kind(self) -> str:
        """The kind of scaling. With the factor 1, linear, YaRN and Llama 3 leave every position as it is."""
        kind = self.rope_type or self.type or "default"
        return "default" if self.factor == 1 and kind in ("linear", "yarn", "llama3") else kind

    def scaling(self, context: int) -> dict[str, Any] | None:
        """The [model.rope_scaling] table, or None."""
        if self.kind == "default":
            return None
        given = {
            "factor": self.factor,
            "original_context": self.original_max_position_embeddings,
            "low_frequency_factor": self.low_freq_factor,
            "high_frequency_factor": self.high_freq_factor,
            "beta_slow": self.beta_slow,
            "beta_fast": self.beta_fast,
        }
        scaling = {name: value for name, value in given.items() if value is not None}
        if self.kind != "linear":  # transformers' default
            scaling.setdefault("original_context", context)
        return {"kind": self.kind, **scaling}


class LlamaKeys(JsonKeys):
    """Llama, Mistral and Qwen3."""

    model_type: str
    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    max_position_embeddings: Context
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool = False
    sliding_window: Context | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: list[str] | None = None

    @model_validator(mode="after")
    def _one_rope(self) -> Self:
        ropes = (self.rope_scaling, self.rope_parameters)
        given = [rope.given for rope in ropes if rope is not None and rope.given]
        if len(given) == 2 and given[0] != given[1]:
            raise ValueError(
                "rope_scaling and rope_parameters differ, so the rotary positions are not known. Remove the "
                "one with which the model was not trained."
            )
        return self

    @property
    def rope(self) -> RopeKeys:
        """The rotary positions, from the key that has any."""
        ropes = (self.rope_scaling, self.rope_parameters)
        return next((rope for rope in ropes if rope is not None and rope.given), RopeKeys())

    def fields(self) -> dict[str, Any]:
        """The [model] table."""
        fields = {
            "n_layers": self.num_hidden_layers,
            "d_model": self.hidden_size,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "d_ff": self.intermediate_size,
            "context": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "norm_eps": self.rms_norm_eps,
            "ffn": _named(GATES, "hidden_act", self.hidden_act),
            "rope_theta": self.rope.rope_theta or self.rope_theta or 10_000.0,
            "bias": bool(self.attention_bias or self.mlp_bias),
            "tie_embeddings": self.tie_word_embeddings,
            "qk_norm": self.model_type == "qwen3",
        }
        window = self._window()
        if window is not None and window < self.max_position_embeddings:  # a wider one sees the whole context
            fields["window"] = window
        optional = {"d_head": self.head_dim, "rope_scaling": self.rope.scaling(self.max_position_embeddings)}
        return fields | {name: value for name, value in optional.items() if value is not None}

    def _window(self) -> int | None:
        """The window of every layer, or None when no layer has one."""
        if self.model_type == "mistral" or self.sliding_window is None:
            return self.sliding_window
        if not self.use_sliding_window:
            return None
        layers = self.num_hidden_layers
        kinds = self.layer_types or ["full_attention"] * min(self.max_window_layers, layers)
        windowed = layers - kinds.count("full_attention")
        if 0 < windowed < layers:
            raise ConfigError(
                f"config.json has a sliding window in {windowed} of {layers} layers. Outlast supports one in "
                "all layers or in none."
            )
        return self.sliding_window if windowed else None


def _named(names: dict[str, str], key: str, theirs: str) -> str:
    for ours, name in names.items():
        if name == theirs:
            return ours
    raise ConfigError(f"config.json has {key} = {theirs!r}. Known: {', '.join(names.values())}.")
