"""FLOPs per token as a closed form of the model config, and the peak FLOPs of GPUs. Torch-free.

`outlast plan`, `outlast status` and MFU use these; a test compares them with torch's FLOP counter.
"""

from math import prod

from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_table

# Peak of one GPU without sparsity and TF32, by the words of its name. From NVIDIA's data sheets of A100 SXM,
# H100 SXM and PCIe, H200 SXM, and HGX B200.
PEAK_FLOPS_PER_SECOND = {
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
}


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of the forward and the backward pass for one token.

    6N + 12·L·H·E·T (PaLM, arXiv:2204.02311, appendix B). N counts every parameter that multiplies an
    activation: the output head counts, tied or not, and embedding look-ups do not. The attention term is that
    of the full T × T matrix, as is usual for MFU, or of W keys per token with a window.
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
