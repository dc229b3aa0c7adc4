"""Peak memory and time of forward and backward with one kind of recomputation, in a process of its own.

`python -m tests.benchmarks.recompute_memory none|selective|full` prints JSON: the bytes beyond the weights
and their gradients, and the seconds, for 4 × 512 tokens through 8 layers of width 512 in bf16.
"""

import json
import sys
import time

import numpy as np
import torch

from gpt.model.attention import Documents
from gpt.model.gpt import GPT
from tests.benchmarks.loss_memory import peak_bytes, reset_peak
from tests.benchmarks.step_speed import BATCH, MODEL


def main() -> None:
    """Measure what the command line asks for."""
    torch.set_num_threads(2)
    gpt = GPT(MODEL.model_copy(update={"recompute": sys.argv[1]}))
    gpt.initialize(0)
    gpt.place(torch.device("cpu"), torch.bfloat16)
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    documents = Documents.from_ends(np.arange(1, BATCH + 1, dtype=np.int32) * MODEL.context)
    tokens = torch.randint(0, MODEL.vocabulary, (BATCH, MODEL.context))
    few = Documents.from_ends(np.array([8], dtype=np.int32))
    gpt(tokens[:1, :8], tokens[:1, :8], few).backward()  # allocates the libraries' own memory
    before = reset_peak()
    started = time.perf_counter()
    gpt(tokens, tokens, documents).backward()
    print(json.dumps({"bytes": peak_bytes() - before, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
