"""Recomputes a block in the backward pass, except its matrix products (model.recompute = "selective").

torch's create_selective_checkpoint_contexts requires that the recomputation runs the same operations as the
forward pass, of whatever kind. At ZeRO stage 3 it does not: weights that are still gathered in one of the two
passes are gathered inside the block in the other. Here only the products must be the same.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: deque[Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            self._kept.append(out.detach())
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: deque[Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS:
            return self._kept.popleft()
        return function(*args, **(kwargs or {}))


def keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of the forward pass and of the recomputation, for torch.utils.checkpoint's `context_fn`.

    Products are expensive to recompute. Korthikanti et al. 2022 (arXiv:2205.05198, section 5) choose by hand
    on the same grounds.
    """
    kept: deque[Tensor] = deque()
    return _Keep(kept), _Reuse(kept)
