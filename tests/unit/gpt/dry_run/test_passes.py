"""The kernels of one layer of a 7B network, and the bytes that they move: a budget that may only fall."""

import numpy as np
import torch

from gpt.config.model import ModelConfig
from gpt.dry_run.device import DEVICE, used_as_gpu
from gpt.dry_run.kernels import in_shapes
from gpt.dry_run.recorder import Recorder
from gpt.model.attention import Documents
from gpt.model.gpt import GPT

TOKENS = 4096
KERNELS = 51
PRODUCT_GB, OTHER_GB = 2.83, 4.41


def layer(recompute: str = "none") -> Recorder:
    """Forward and backward pass of one layer of llama-7b over 4,096 tokens, without embedding and loss."""
    shape = {"n_layers": 1, "d_model": 4096, "n_heads": 32, "context": TOKENS, "vocab_size": 64}
    model = ModelConfig.model_validate({**shape, "recompute": recompute})
    recorder = Recorder()
    with used_as_gpu(recorder.wait, (9, 0), "a GPU"), in_shapes(), recorder:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with DEVICE:
                gpt = GPT(model).place(DEVICE, torch.bfloat16)
        finally:
            torch.set_default_dtype(torch.float32)
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device=DEVICE)
        documents = Documents.from_ends(np.array([TOKENS], dtype=np.int32), DEVICE)
        x_btd = torch.zeros(1, TOKENS, model.d_model, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        gpt.final_norm = torch.nn.Identity()
        gpt._embedded = lambda *_: x_btd  # type: ignore[method-assign]
        gradient = torch.zeros_like(x_btd)
        recorder.begin()
        gpt.hidden(ids, documents).backward(gradient)
    return recorder


def test_layer_takes_no_more_kernels_and_bytes_than_before() -> None:
    found = layer()
    products, others = (found.moved_bytes[kind] / 1e9 for kind in ("products", "others"))
    assert found.kernels <= KERNELS, "a change adds passes over the activations"
    assert products <= PRODUCT_GB and others <= OTHER_GB
    assert found.host_waits == ()


def test_recomputation_adds_passes() -> None:
    """The budget sees them."""
    none, selective, full = (layer(recompute) for recompute in ("none", "selective", "full"))
    assert none.kernels < selective.kernels < full.kernels
    assert selective.moved_bytes["products"] == none.moved_bytes["products"] < full.moved_bytes["products"]
