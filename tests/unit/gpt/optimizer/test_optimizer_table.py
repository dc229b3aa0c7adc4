"""The table of optimizers, and what it takes to add one: a row and a class."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gpt.config.model import ModelConfig
from gpt.config.optimizer import OptimizerConfig
from gpt.config.optimizer_spec import OPTIMIZERS, GroupSpec, OptimizerSpec, Shape
from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from gpt.model.gpt import GPT
from gpt.optimizer.base import RunOptimizer
from gpt.optimizer.build import OPTIMIZER_CLASSES, build_optimizer, group_table, set_rate
from gpt.optimizer.parameter_groups import parameter_entries, states
from gpt.optimizer.whole_matrices import MatrixExchange
from launcher.preflight.memory import memory, state_bytes
from tests.unit.gpt.model.support import build, random_tokens, rows

SGD = OptimizerSpec(
    (GroupSpec("all", "SGD", ("momentum_buffer",), ("momentum",)),),
    group_of=lambda name, shape, model: "all",  # noqa: ARG005
)


class MomentumSGD(RunOptimizer):
    def __init__(self, groups: list[dict[str, Any]], optimizer: OptimizerConfig, dtype: torch.dtype) -> None:
        del dtype
        super().__init__(groups, {"lr": optimizer.peak_lr})

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(self.new_state(parameter))
                state["step"] += 1
                gradient = parameter.grad + group["weight_decay"] * parameter
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                parameter.sub_(state["momentum_buffer"], alpha=group["lr"])


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", SGD)
    monkeypatch.setitem(OPTIMIZER_CLASSES, "sgd", MomentumSGD)


def run_config(optimizer: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "table",
            "precision": "fp32",
            "model": {"n_layers": 2, "d_model": 48, "n_heads": 4, "context": 24, "vocab_size": 101},
            "data": {"path": "none"},
            "batch": {"global_batch_tokens": 48, "micro_batch": 2},
            "optimizer": {"name": optimizer, "peak_lr": 0.1, "momentum": 0.8, "weight_decay": 0.01},
            "schedule": {"total_steps": 5},
        }
    )


def losses_of(gpt: GPT, optimizer: torch.optim.Optimizer, rates: list[float]) -> list[float]:
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=8)
    losses = []
    for lr in rates:
        optimizer.zero_grad()
        loss = gpt(tokens, targets, rows(tokens)) / targets.numel()
        loss.backward()
        for group in optimizer.param_groups:
            group.setdefault("lr_multiplier", 1.0)
        set_rate(optimizer, lr)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("sgd")
def test_an_optimizer_is_added_by_one_row_and_one_class() -> None:
    run, rates = run_config("sgd"), [0.02, 0.1, 0.1, 0.1, 0.05]
    ours, theirs = build(), build()
    found = losses_of(ours, build_optimizer(ours, run.optimizer, torch.float32), rates)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    assert found == pytest.approx(losses_of(theirs, reference, rates), rel=1e-5)
    assert found[-1] < found[0]


@pytest.mark.usefixtures("sgd")
def test_the_memory_plan_and_checkpoints_count_an_added_optimizer() -> None:
    run, adamw = run_config("sgd"), run_config("adamw")
    count = parameter_count(run.model)
    assert (state_bytes(run), state_bytes(adamw)) == (8 * count, 12 * count)
    assert memory(adamw, 1).optimizer - memory(run, 1).optimizer == 4 * count
    entries = parameter_entries(run.model, run.optimizer)
    assert {entry.group for entry in entries} == {"all"}
    assert sum(entry.numel for entry in entries) == count
    assert states("all", run.optimizer) == ("master", "momentum_buffer")
    assert group_table(build(), run.optimizer).startswith("all: SGD, ")


@pytest.mark.usefixtures("sgd")
def test_mup_is_refused_for_an_optimizer_without_a_group_for_its_rates() -> None:
    tables = run_config("sgd").model_dump()
    mup = {**tables["model"], "initialization": "mup", "mup_base_width": 16}
    with pytest.raises(ValidationError, match=r"optimizer.name = 'sgd' has no such rates. Use one of them"):
        RunConfig.model_validate({**tables, "model": mup})


def test_an_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"'sgd' is not an optimizer. Known: adamw, muon"):
        OptimizerConfig(name="sgd")
    schema = OptimizerConfig.model_json_schema()
    assert schema["properties"]["name"]["enum"] == ["adamw", "muon"]


def test_every_row_has_a_class_and_every_class_a_row() -> None:
    assert OPTIMIZERS.keys() == OPTIMIZER_CLASSES.keys()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("initialization", [{}, {"initialization": "mup", "mup_base_width": 16}])
def test_an_optimizer_keeps_the_states_that_its_row_lists(
    name: str, moments: str, initialization: dict[str, Any]
) -> None:
    config = OptimizerConfig.model_validate({"name": name, "moments": moments})
    gpt = build(**initialization)
    optimizer = build_optimizer(gpt, config, torch.float32)
    for group in optimizer.param_groups:
        spec = config.spec.group(group["name"])
        assert set(spec.fields) <= group.keys()
        for parameter in group["params"]:
            if spec.needs_whole_matrices:
                optimizer.use_exchange(parameter, MatrixExchange([], rank=0, world_size=1))
            kept = optimizer.new_state(parameter)
            kept.pop("step", None)
            assert tuple(kept) == spec.states
            kept_bytes = sum(state.nbytes for state in kept.values()) + 4 * parameter.numel()
            assert kept_bytes == parameter.numel() * spec.bytes_per_parameter(config.moment_bytes)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("initialization", ["gpt2", "mup"])
def test_the_rule_of_a_row_names_only_its_groups(name: str, initialization: str) -> None:
    spec, model = OPTIMIZERS[name], ModelConfig.model_construct(initialization=initialization)
    parameters: list[tuple[str, Shape]] = [
        ("embedding.weight", (9, 4)),
        ("blocks.0.ffn.up.weight", (8, 4)),
        ("blocks.0.ffn_norm.weight", (4,)),
        ("head.weight", (9, 4)),
    ]
    for parameter, shape in parameters:
        assert spec.group_of(parameter, shape, model) in {group.name for group in spec.groups}
