"""How a worker's GPU rounds: settings of torch that must be made before its first product."""

import torch


def set_rounding() -> None:
    """Sum the parts of 16-bit matrix products in fp32.

    By default cuBLAS may split a long sum over thread blocks and add the parts in 16 bits. No effect on CPUs.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
