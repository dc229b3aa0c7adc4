"""Parameters and FLOPs as closed forms of the model config, without torch.

`outlast plan`, `outlast status` and MFU stand on these; tests hold them against the built network.
"""

from collections.abc import Iterator
from math import prod

from gpt.config.model import ModelConfig

# Dense peaks of one GPU, without sparsity and TF32, by the words of its name (NVIDIA's data sheets of A100
# SXM, H100 SXM and PCIe, H200 SXM, HGX B200).
PEAK_FLOPS_PER_SECOND = {
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
}


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


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the network; a tied head counts once."""
    return sum(prod(shape) for _, shape in parameter_table(model))


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of forward and backward for one token.

    6N + 12·L·H·E·T (PaLM, arXiv:2204.02311, appendix B): N is every parameter that multiplies an
    activation, so the output head counts (also where it is tied) and the embedding look-ups do not; the
    attention term is that of the full T × T matrix, as is usual for MFU, or of W keys a token in a window.
    """
    matrices = sum(
        prod(shape)
        for name, shape in parameter_table(model)
        if len(shape) == 2 and name not in ("embedding.weight", "position.weight", "head.weight")
    )
    head = model.vocabulary * model.d_model
    seen = min(model.window or model.context, model.context)
    attention = 12 * model.n_layers * model.n_heads * model.head_width * seen
    return 6 * (matrices + head) + attention


def _linear(model: ModelConfig, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if model.bias:
        yield f"{name}.bias", (rows,)


def _norm(model: ModelConfig, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (model.d_model,)
    if model.norm == "layernorm" and model.bias:
        yield f"{name}.bias", (model.d_model,)
