"""Reads the config.json and generation_config.json of a folder that transformers loads.

What the models of Outlast do not have is refused. Keys that do not change what the model computes are passed
over. This module does not import torch or transformers.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.huggingface.architectures import twin_config, twin_obstacle
from gpt.huggingface.config_keys import Gpt2Keys, JsonKeys, LlamaKeys
from gpt.run.json_file import read_json

TokenId = Annotated[int, Field(ge=0)]


class _Outlast(JsonKeys):
    """An export of a model for which transformers has no architecture."""

    model: dict[str, Any]


class _Ends(JsonKeys):
    """What ends a text, in config.json or generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids; empty when the file names none."""
        ids = self.eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


# Keys that do not describe the model, or that several keys express.
_FREE = {
    "architectures",
    "model_type",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
    "rope_theta",
}
_FREE |= {"activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
_FREE |= {"sliding_window", "use_sliding_window", "max_window_layers"}
# Settings that the models of Outlast have at one value only.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
}
# Settings of the rotary positions that change nothing at these values.
_ROPE_NEUTRAL = {"partial_rotary_factor": 1.0, "truncate": True}
# Keys whose defaults in transformers differ between architectures, so they must be given.
_NEEDED_BY_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
)
_NEEDED = {
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
    "llama": _NEEDED_BY_LLAMA,
    "mistral": (*_NEEDED_BY_LLAMA, "num_key_value_heads", "sliding_window"),
    "qwen3": (*_NEEDED_BY_LLAMA, "num_key_value_heads", "head_dim"),
}
# Keys that say that the stored numbers are not the weights themselves, or that other files hold them.
_ELSEWHERE = {
    "quantization_config": "The weights are quantized. Save the model in bf16, fp16 or fp32.",
    "compression_config": "The weights are compressed. Save the model in bf16, fp16 or fp32.",
    "transformers_weights": "Name the file model.safetensors and remove the key.",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`.

    Raises ConfigError when there is none, when it is not an object, and when it describes only a part of the
    model.
    """
    content = read_object(folder / "config.json")
    if content is None:
        raise ConfigError(
            f"{folder} has no config.json. Give a folder that transformers' save_pretrained wrote."
        )
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder} has an adapter_config.json, so its weights are those of the model plus an adapter. "
            "Merge the adapter into the model (peft's merge_and_unload) and save it again."
        )
    return content


def end_ids(folder: Path) -> dict[str, tuple[int, ...]]:
    """The ids that end a text, by the file that names them; what `generate` uses comes first.

    Raises ConfigError for a value that is no token id.
    """
    ends = {}
    for name in ("generation_config.json", "config.json"):
        ids = validate(_Ends, read_object(folder / name) or {}, name).ids
        if ids:
            ends[name] = ids
    return ends


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a foreign folder, or None when there is no such file.

    Raises ConfigError for anything else: a folder, a FIFO, a file that may not be read or is not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a regular file.")
        return read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a model's config.") from None


def model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The [model] table for a config.json of GPT-2, Llama, Mistral, Qwen3 or `outlast export`.

    Raises ConfigError for another architecture, for a value of the wrong type, and for a setting that the
    models of Outlast do not have.
    """
    for key, reason in _ELSEWHERE.items():
        if config.get(key) is not None:
            raise ConfigError(f"config.json has {key} = {_short(config[key])}. {reason}")
    kind = config.get("model_type")
    if kind == "outlast":
        own = validate(_Outlast, config, "config.json").model
        validate(ModelConfig, own, "config.json")
        return own
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ConfigError(f"model_type = {kind!r} cannot be imported. Known: gpt2, llama, mistral and qwen3.")
    missing = [key for key in _NEEDED[kind] if key not in config]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}, and {kind} has no fixed default for it.")
    read: Gpt2Keys | LlamaKeys
    if kind == "gpt2":
        read = validate(Gpt2Keys, config, "config.json")
    else:
        read = validate(LlamaKeys, config, "config.json")
    fields = read.fields()
    model = validate(ModelConfig, fields, "config.json")
    obstacle = twin_obstacle(model)
    if obstacle is not None:
        raise ConfigError(f"config.json asks for {obstacle}, which Outlast computes differently.")
    twin = twin_config(model, "float32", 0)
    expected = {key: twin[key] for key in sorted(twin.keys() - _FREE)} | _FIXED
    problems = [
        f"config.json has {key} = {_short(config[key])}; Outlast supports only {value!r}."
        for key, value in expected.items()
        if config.get(key) not in (value, None)
    ]
    unknown = read.rope.unknown if isinstance(read, LlamaKeys) else {}
    problems += [
        f"config.json has {key} = {_short(value)} for its rotary positions; Outlast has no such setting."
        for key, value in unknown.items()
        if value not in (None, _ROPE_NEUTRAL.get(key))
    ]
    if problems:
        raise ConfigError(problems)
    return fields


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
