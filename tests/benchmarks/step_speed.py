"""Seconds of a training step of several networks of one shape, in one process with two threads.

`python -m tests.benchmarks.step_speed DTYPE TURNS [NAME…]` measures forward, backward and AdamW over 4 × 512
tokens (8 layers, width 512, SwiGLU 1408, vocabulary 8,192), in bf16 with fp32 master weights. The networks
take turns. It prints JSON: the median seconds of each, and the FLOPs per second of a large matrix product in
the same process.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gpt.config.model import ModelConfig
from gpt.model.attention import Documents
from gpt.model.gpt import GPT
from tests.benchmarks.peer_networks import HandWritten, TransformersLlama

MODEL = ModelConfig(n_layers=8, d_model=512, n_heads=8, d_ff=1408, context=512, vocab_size=8192)
BATCH = 4
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(dtype: torch.dtype, *, is_compiled: bool) -> tuple[nn.Module, Loss]:
    gpt = GPT(MODEL)
    gpt.initialize(0)
    gpt.place(torch.device("cpu"), dtype)
    if is_compiled:
        gpt.compile_parts(whole_rows=True)
    ends = np.arange(1, BATCH + 1, dtype=np.int32) * MODEL.context
    documents = Documents.from_ends(ends)
    return gpt, lambda tokens, targets: gpt(tokens, targets, documents) / targets.numel()


def peer(network: nn.Module, dtype: torch.dtype, *, is_compiled: bool) -> tuple[nn.Module, Loss]:
    network.to(dtype)
    return network, torch.compile(network) if is_compiled else network


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    """The network `name`, and a function that returns its mean loss."""
    kind, _, how = name.partition(" ")
    is_compiled = how == "compiled"
    if kind == "ours":
        return ours(dtype, is_compiled=is_compiled)
    network = (
        TransformersLlama(MODEL) if kind == "transformers" else HandWritten(MODEL, is_llama=kind == "minimal")
    )
    return peer(network, dtype, is_compiled=is_compiled)


NAMES = [
    f"{kind} {how}"
    for how in ("eager", "compiled")
    for kind in ("ours", "transformers", "minimal", "nanogpt")
]


class Step:
    """One network with its optimizer, and fp32 master weights if its weights are in bf16."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        network, self.loss = build(name, dtype)
        self.parameters = list(network.parameters())
        is_mixed = dtype != torch.float32
        self.masters = [p.detach().float().clone() for p in self.parameters] if is_mixed else self.parameters
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def take(self, tokens: Tensor, targets: Tensor) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.loss(tokens, targets).backward()
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        return time.perf_counter() - started


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """FLOPs per second of the product of two 2048 × 2048 matrices, the best of ten."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))

    def seconds() -> float:
        started = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - started

    return 2 * 2048**3 / min(seconds() for _ in range(10))


def main() -> None:
    """Measure what the command line asks for."""
    dtype, turns = getattr(torch, sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(2)
    torch.manual_seed(0)
    names = sys.argv[3:] or NAMES
    tokens, targets = (torch.randint(0, MODEL.vocabulary, (BATCH, MODEL.context)) for _ in range(2))
    steps = {name: Step(name, dtype) for name in names}
    first = {name: step.take(tokens, targets) for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for _ in range(turns):
        peaks.append(matmul_flops_per_second(dtype))
        for name, step in steps.items():
            taken[name].append(step.take(tokens, targets))
    seconds = {name: float(np.median(turns)) for name, turns in taken.items()}
    print(json.dumps({"seconds": seconds, "first": first, "matmul": max(peaks)}))


if __name__ == "__main__":
    main()
