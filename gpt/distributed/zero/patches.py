"""What Outlast changes in DeepSpeed and torch, each change with its reason.

Private in DeepSpeed 0.19 and used here: the list of optimizers that it knows, `check_overflow`,
`scaled_global_norm`, `unscale_and_clip_grads`, `averaged_gradients`, the functions of bf16_optimizer that
compute a norm and clip, and of fp16 `_update_scale`. tests/distributed/test_zero_contract.py and
test_reduction.py fail when one of them changes its meaning.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.model.hardware import is_cpu
from gpt.optimizer.build import OPTIMIZER_CLASSES

_NORM_BLOCK_NUMEL = 1024


def import_deepspeed(device: torch.device) -> Any:
    """The module deepspeed, with everything adapted that has to be before `initialize`."""
    if is_cpu(device):
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed's autotuner imports MLflow when it is installed, which costs every start 2 s.
    was_loaded = "mlflow" in sys.modules
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    import deepspeed

    # DeepSpeed calls this torch function by its old name once a step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    if not was_loaded:
        del sys.modules["mlflow"]
    # DeepSpeed's Muon, which nothing here uses, is decorated with torch.compile and would load the compiler.
    with patch.object(torch, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed warns about optimizers that it has not tested; ours are tested here at every stage.
    known = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    known.extend(kind for kind in OPTIMIZER_CLASSES.values() if kind not in known)
    if is_cpu(device):
        # torch computes in fp16 on every CPU, slowly; DeepSpeed requires a CPU that is fast at it.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        # The shared-memory collectives compile for 40 s at first use and raise without a compiler, and the
        # question which ops could be built takes 2 s. gloo needs none of them.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def check_overflow_once(zero: Any) -> None:
    """Make stages 1 and 2 wait for the device once a step, to learn whether the gradient's norm is finite.

    DeepSpeed scans every gradient for overflow, waits, and then computes the norm of each group in fp64, with
    a collective and two more waits each; when gradients accumulate in fp32, it also waits to know whether to
    clip. A non-finite gradient has no finite norm, so one look at the global norm is enough.
    """
    if not hasattr(zero, "averaged_gradients"):
        import deepspeed.runtime.bf16_optimizer

        deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = _norm_on_rank
        deepspeed.runtime.bf16_optimizer.clip_tensors_by_global_norm = _clip
        return

    def scaled_global_norm(norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        gradients = [g for group in zero.averaged_gradients.values() for g in group or () if g is not None]
        total = squared_norm(gradients, zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        return total.sqrt().float()

    def unscale_and_clip_grads(gradients: Sequence[Tensor], scaled_norm: Tensor) -> None:
        over = ((scaled_norm / zero.loss_scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
        for gradient in gradients:
            gradient.mul_(1.0 / (over * zero.loss_scale))

    zero.check_overflow = lambda partition_gradients=True: None  # noqa: ARG005
    zero.scaled_global_norm = scaled_global_norm
    zero.unscale_and_clip_grads = unscale_and_clip_grads


def squared_norm(gradients: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """The sum of the squares of all elements of `gradients`, an fp64 scalar on `device`.

    A CPU adds fp32 squares one after the other, and the norm of 50 million elements is 0.4% too small. The
    norm of a short block is exact to 1e-7, and the squares of the blocks' norms are summed in fp64. A GPU
    adds in a tree anyway, so there a gradient is one block.
    """
    norms = []
    for gradient in gradients:
        flat = gradient.detach().reshape(-1)
        block = _NORM_BLOCK_NUMEL if is_cpu(flat.device) else max(1, flat.numel())
        whole = flat.numel() // block * block
        for part in (flat[:whole].view(-1, block), flat[whole:].view(1, -1)):
            if part.numel():
                norms.append(torch.linalg.vector_norm(part, dim=1, dtype=torch.float32))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(norms).double().square().sum()


def _norm_on_rank(input_tensors: Sequence[Tensor], **_: Any) -> Tensor:
    """The norm of gradients that every rank has whole, fp32."""
    return squared_norm(input_tensors, input_tensors[0].device).sqrt().float()


def keep_loss_scale_within_step(zero: Any) -> None:
    """Stop DeepSpeed from changing fp16's loss scale in the middle of a step; `Engine.step` changes it.

    DeepSpeed would divide gradients that were computed with the old scale by the new one.
    """
    zero._update_scale = lambda has_overflow=False: None  # noqa: ARG005


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> None:
    scale = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(scale)
