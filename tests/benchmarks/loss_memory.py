"""Peak memory or time of the loss with its gradient, measured in a process of its own.

`python -m tests.benchmarks.loss_memory plain|ours|both DTYPE ROWS WIDTH VOCABULARY` prints JSON: for plain or
ours the bytes beyond the inputs, for both the seconds of each, measured in alternation.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model.hardware import compute_dtype
from gpt.model.loss import cross_entropy_sum


def plain(hidden_xd: Tensor, weight_vd: Tensor, targets_x: Tensor) -> Tensor:
    """The usual loss: all logits at once, then cross-entropy in fp32."""
    dtype = compute_dtype(hidden_xd)
    logits_xv = F.linear(hidden_xd.to(dtype), weight_vd.to(dtype)).to(hidden_xd.dtype)
    return F.cross_entropy(logits_xv.float(), targets_x, reduction="sum")


def peak_bytes() -> int:
    """The most memory that this process has held since `reset_peak`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Restart the count of the peak, and return the bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def main() -> None:
    """Measure what the command line asks for."""
    name, dtype, *sizes = sys.argv[1:]
    rows, width, vocabulary = map(int, sizes)
    torch.set_num_threads(2)
    kind = getattr(torch, dtype)
    hidden = torch.randn(rows, width).to(kind).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.02).to(kind).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    losses = {"plain": plain, "ours": cross_entropy_sum}

    def seconds(name: str) -> float:
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        losses[name](hidden, weight, targets).backward()
        return time.perf_counter() - started

    if name == "both":
        turns = [{name: seconds(name) for name in losses} for _ in range(5)]
        print(json.dumps({name: min(turn[name] for turn in turns) for name in losses}))
    else:
        torch.ones(64, 64) @ torch.ones(64, 64)  # allocates the libraries' own memory
        before = reset_peak()
        seconds(name)
        print(json.dumps(peak_bytes() - before))


if __name__ == "__main__":
    main()
