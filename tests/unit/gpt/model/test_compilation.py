"""torch.compile gives the numbers of eager blocks, with one compilation for all blocks and documents."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.model.attention import Documents
from gpt.model.compilation import compile_seconds
from tests.unit.gpt.model.support import build, random_tokens

DOCUMENTS = [(24, 48), (3, 5, 24, 25, 48), (10, 24, 31, 48), (24, 48)]


def test_compiled_network_equals_the_eager_one_and_new_documents_do_not_recompile() -> None:
    eager, compiled = (build("auto", n_kv_heads=2, logit_softcap=9.0, z_loss=0.01) for _ in range(2))
    names = list(compiled.state_dict())
    before = compile_seconds()
    compiled.compile_parts()
    assert list(compiled.state_dict()) == names
    graphs = []
    for seed, ends in enumerate(DOCUMENTS):
        documents = Documents.from_ends(np.array(ends, dtype=np.int32))
        tokens, targets = random_tokens(2, 24, seed=seed), random_tokens(2, 24, seed=seed + 9)
        targets[0, :3] = -100
        losses = []
        for gpt in (eager, compiled):
            gpt.zero_grad()
            loss = gpt(tokens, targets, documents)
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    assert compile_seconds() > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_whole_rows_is_compiled_without_a_graph_break(dtype: torch.dtype) -> None:
    eager, compiled = (build("auto", n_kv_heads=2).to(dtype) for _ in range(2))
    compiled.compile_parts(whole_rows=True)
    counters.clear()
    documents = Documents.from_ends(np.array((24, 48), dtype=np.int32))
    tokens, targets = random_tokens(2, 24, seed=1), random_tokens(2, 24, seed=2)
    losses = [gpt(tokens, targets, documents).item() for gpt in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["graph_break"] == {}


def test_missing_compiler_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"compile = true needs a C\+\+ compiler on every node"):
        build().compile_parts()


def test_compile_with_selective_recomputation_is_refused() -> None:
    tables = {"name": "t", "data": {"path": "x"}, "schedule": {"total_steps": 1}, "compile": True}
    RunConfig.model_validate({**tables, "model": {"recompute": "full"}})
    with pytest.raises(
        ValidationError, match=r"model.recompute = 'selective' does not work with compile = true"
    ):
        RunConfig.model_validate({**tables, "model": {"recompute": "selective"}})
