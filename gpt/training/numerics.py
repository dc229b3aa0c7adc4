"""How a worker's GPU rounds: settings of torch, cuBLAS and NCCL, made before the first of them is used."""

import os

import torch

# cuBLAS gives the same bits only with a workspace of a fixed size; torch accepts this one and ":16:8".
_CUBLAS_WORKSPACE = ":4096:8"
# Each algorithm adds in an order of its own, and NCCL chooses among them by measurements of the links.
_NCCL = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


def set_rounding(*, is_deterministic: bool) -> None:
    """Sum the parts of 16-bit matrix products in fp32, and with `is_deterministic` add in a fixed order.

    By default cuBLAS may split a long sum over thread blocks and add the parts in 16 bits. No effect on CPUs.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if not is_deterministic:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # choose no kernel by its measured time
    for name, value in _NCCL.items():
        os.environ.setdefault(name, value)  # the cluster file may fix another one
    torch.use_deterministic_algorithms(True)
    # torch would fill every new tensor with NaN. Nothing here reads memory that it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
