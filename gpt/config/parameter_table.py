"""Name and shape of every parameter of the network, as closed forms of the model config. Torch-free.

The memory plan, the parameter groups, export and import read these tables; a test compares them with the
built network.
"""

from collections.abc import Iterator
from math import prod

from gpt.config.model import ModelConfig


def parameter_table(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of the network, in the order in which it registers them."""
    d, f = model.d_model, model.ffn_width
    heads, kv_heads, e = model.n_heads, model.kv_heads, model.head_width
    yield "embedding.weight", (model.vocabulary, d)
    if model.position == "learned":
        yield "position.weight", (model.context, d)
    for i in range(model.n_layers):
        block = f"blocks.{i}"
        yield from _norm(model, f"{block}.attention_norm")
        yield from _linear(model, f"{block}.attention.qkv", (heads + 2 * kv_heads) * e, d)
        yield from _linear(model, f"{block}.attention.output", d, heads * e)
        if model.qk_norm:
            yield f"{block}.attention.query_norm.weight", (e,)
            yield f"{block}.attention.key_norm.weight", (e,)
        yield from _norm(model, f"{block}.ffn_norm")
        yield from _linear(model, f"{block}.ffn.up", 2 * f if model.is_gated else f, d)
        yield from _linear(model, f"{block}.ffn.down", d, f)
    if model.norm_placement == "pre":
        yield from _norm(model, "final_norm")
    if not model.tie_embeddings:
        yield "head.weight", (model.vocabulary, d)


def stacked_rows(model: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """The rows of each matrix that is stacked in the parameter `name`, which has `rows` rows in all.

    Queries, keys and values are one parameter of three matrices; the gate and the value of the feed-forward
    network are one of two.
    """
    if name.endswith("attention.qkv.weight"):
        return tuple(heads * model.head_width for heads in (model.n_heads, model.kv_heads, model.kv_heads))
    if name.endswith("ffn.up.weight") and model.is_gated:
        return (model.ffn_width, model.ffn_width)
    return (rows,)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the network; a tied head counts once."""
    return sum(prod(shape) for _, shape in parameter_table(model))


def block_numel(model: ModelConfig) -> int:
    """Parameters of one block."""
    return sum(prod(shape) for name, shape in parameter_table(model) if name.startswith("blocks.0."))


def _linear(model: ModelConfig, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if model.bias:
        yield f"{name}.bias", (rows,)


def _norm(model: ModelConfig, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (model.d_model,)
    if model.norm == "layernorm" and model.bias:
        yield f"{name}.bias", (model.d_model,)
