"""FLOPs per token as a closed form of the model config, and the peak FLOPs of GPUs. Torch-free.

`outlast plan`, `outlast status` and MFU use these; a test compares them with torch's FLOP counter.
"""

from math import prod

from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_table


def _peaks(tensor: float, fp32: float) -> dict[str, float]:
    """FLOP/s by precision, from TFLOP/s."""
    return {"bf16": tensor * 1e12, "fp16": tensor * 1e12, "fp32": fp32 * 1e12}


# Peak of one GPU without sparsity and TF32, by the words of the name that torch gives it. From NVIDIA's data
# sheets; a system's number is divided by its GPUs. Of the rows that fit, the one with the most words counts.
PEAK_FLOPS_PER_SECOND = {
    "A100": _peaks(312, 19.5),  # SXM and PCIe
    "A800": _peaks(312, 19.5),
    "H100": _peaks(989, 67),  # SXM; its name has only the memory
    "H100 PCIe": _peaks(756, 51),
    "H100 NVL": _peaks(835, 60),
    "H800": _peaks(989, 67),
    "H200": _peaks(989, 67),
    "H200 NVL": _peaks(835, 60),
    "GH200": _peaks(989, 67),
    "H20": _peaks(148, 44),
    "B200": _peaks(2250, 75.0),  # HGX B200
    "GB200": _peaks(2500, 80),  # GB200 NVL72
    "B300": _peaks(2250, 75.0),  # HGX B300
    "GB300": _peaks(2500, 80),  # GB300 NVL72
    "L40S": _peaks(362, 91.6),
    "L40": _peaks(181, 90.5),
    # The sum of products in fp32; the three editions differ in power.
    "RTX PRO 6000": _peaks(503.8, 126),
    "RTX PRO 6000 Server": _peaks(480, 120),
    "RTX PRO 6000 Max Q": _peaks(438.9, 110),
}


def peaks_of_gpu(name: str) -> dict[str, float] | None:
    """Peak FLOP/s by precision of the GPU with this device name; None when it is not in the table.

    A part of a GPU (MIG) has its whole GPU's name, and is not in the table.
    """
    words = set(name.replace("-", " ").upper().split())
    fitting = [gpu for gpu in PEAK_FLOPS_PER_SECOND if set(gpu.upper().split()) <= words]
    if not fitting or "MIG" in words:
        return None
    return PEAK_FLOPS_PER_SECOND[max(fitting, key=lambda gpu: len(gpu.split()))]


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
    return 6 * (matrices + head) + _flops_per_key(model) * _window(model)


def causal_flops_per_token(model: ModelConfig) -> float:
    """As flops_per_token, but attention counts only the keys that the causal mask lets a token see.

    These are (T + 1) / 2 keys on average, or fewer with a window: half of the attention term of MFU. The ends
    of documents inside a row are not counted.
    """
    context, window = model.context, _window(model)
    seen = window * (2 * context - window + 1) / (2 * context)
    return flops_per_token(model) - _flops_per_key(model) * (window - seen)


def _flops_per_key(model: ModelConfig) -> int:
    return 12 * model.n_layers * model.n_heads * model.head_width


def _window(model: ModelConfig) -> int:
    return min(model.window or model.context, model.context)
