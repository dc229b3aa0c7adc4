"""The recipes agree with what was published about their models. No weights are allocated."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.config_file import validate
from gpt.config.parameter_table import parameter_count, parameter_table
from gpt.config.run import RunConfig
from gpt.model.flops import flops_per_token
from gpt.model.gpt import GPT
from launcher.runs.recipes import recipe_names, recipe_path, run_tables
from tests.unit.gpt.model.support import CPU, rows

# transformers' published checkpoints of these models (tensors of model.safetensors, a tied head once);
# transformer-base: V·D + L·(4·(D² + D) + (2·D·F + F + D) + 2·2·D), by hand from the paper's table 3.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-160m": 162_417_408,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "transformer-base": 37_000 * 512 + 6 * (4 * (512**2 + 512) + (2 * 512 * 2048 + 2048 + 512) + 2 * 2 * 512),
}


def recipe(name: str) -> RunConfig:
    tables, source = run_tables(name, ["data.path=nowhere"])
    return validate(RunConfig, tables, source)


def test_every_model_of_the_papers_has_a_recipe() -> None:
    assert set(PUBLISHED) == set(recipe_names()) - {"tiny", "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_number_of_parameters(name: str) -> None:
    model = recipe(name).model
    assert parameter_count(model) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,} parameters" in recipe_path(name).read_text().replace("\n# ", " ")
    with torch.device("meta"):
        gpt = GPT(model)
    assert sum(p.numel() for p in gpt.parameters()) == PUBLISHED[name]
    assert list(parameter_table(model)) == [(n, tuple(p.shape)) for n, p in gpt.named_parameters()]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_batch_of_a_recipe_can_be_split_for_usual_world_sizes(name: str, world_size: int) -> None:
    run = recipe(name)
    if world_size * run.batch.micro_batch <= run.global_batch:
        assert run.batch_problem(world_size) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_of_a_scaled_down_recipe_agree_with_torchs_counter(name: str) -> None:
    model = recipe(name).model
    heads = 4
    kv_heads = max(1, heads * model.kv_heads // model.n_heads)
    small = {
        "n_layers": 2,
        "d_model": 32,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "d_ff": round(32 * model.ffn_width / model.d_model),
        "context": 32,
        "vocab_size": 96,
        "attention": "reference",
    }
    gpt = GPT(model.model_copy(update=small)).place(CPU, torch.float32)
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens, rows(tokens)).backward()
    assert counter.get_total_flops() == flops_per_token(gpt.model) * tokens.numel()


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("gpt2-124m", 0.5e6, 6e-4),
        ("gpt2-355m", 0.5e6, 3e-4),
        ("gpt2-774m", 0.5e6, 2.5e-4),
        ("gpt2-1.5b", 1e6, 2e-4),
    ],
)
def test_gpt2_recipes_have_the_batches_and_rates_of_gpt3(name: str, batch: float, rate: float) -> None:
    """Brown et al. 2020, arXiv:2005.14165, table 2.1 (M is 2^20 there) and appendix B."""
    run = recipe(name)
    assert run.batch.global_batch_tokens == batch * 2**20 / 1e6
    assert run.optimizer.peak_lr == rate
    warmup = run.schedule.warmup_steps * run.batch.global_batch_tokens
    assert warmup == pytest.approx(375e6, rel=0.002)
