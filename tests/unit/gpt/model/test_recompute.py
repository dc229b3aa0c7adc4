"""Activation checkpointing gives the same numbers with fewer bytes kept, and recomputes what it should."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt.model.gpt import seed_dropout
from tests.unit.gpt.model.support import build, random_tokens, rows


def run(recompute: str, **fields: object) -> tuple[list[torch.Tensor], int, int]:
    """Loss and gradients, bytes that the forward pass kept without the parameters, FLOPs of both passes."""
    gpt = build(recompute=recompute, n_layers=3, **fields)
    tokens = random_tokens(4, 24)
    own = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seed_dropout(1, 2, 3)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = gpt(tokens, tokens, rows(tokens))
        kept_bytes = sum(kept.values())
        loss.backward()
    gradients = [p.grad for p in gpt.parameters() if p.grad is not None]
    return [loss.detach(), *gradients], kept_bytes, counter.get_total_flops()


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.2}, {"window": 5, "n_kv_heads": 2}])
def test_recomputation_does_not_change_loss_and_gradients(fields: dict[str, object]) -> None:
    expected, _, _ = run("none", **fields)
    for recompute in ("selective", "full"):
        found, _, _ = run(recompute, **fields)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_full_recomputes_blocks_and_selective_recomputes_no_matrix_products() -> None:
    _, kept, flops = run("none")
    _, _, flops_selective = run("selective")
    _, kept_full, flops_full = run("full")
    assert kept_full < kept / 3
    assert flops < flops_full
    # Attention is recomputed, matrix products are not.
    assert flops <= flops_selective < (flops + flops_full) / 2


def test_selective_recomputation_allows_other_work_inside_a_block() -> None:
    """ZeRO stage 3 gathers weights inside a block in one of the two passes only."""

    def gradients(*, gathers_in_pass: int | None) -> list[torch.Tensor]:
        gpt = build(recompute="selective", n_layers=2)
        passes = [0] * len(gpt.blocks)

        def gather(index: int) -> None:
            passes[index] += 1
            if passes[index] == gathers_in_pass:
                torch.cat([torch.ones(3), torch.ones(2)]).narrow(0, 1, 2)

        for index, block in enumerate(gpt.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: gather(index))
        tokens = random_tokens(2, 24)
        gpt(tokens, tokens, rows(tokens)).backward()
        assert passes == [2] * len(gpt.blocks)
        return [p.grad for p in gpt.parameters() if p.grad is not None]

    expected = gradients(gathers_in_pass=None)
    for number in (1, 2):
        found = gradients(gathers_in_pass=number)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
