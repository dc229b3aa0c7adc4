"""DeepSpeed ZeRO: the only file that writes its config or touches its internals.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) stage 1 shards the optimizer's state over the ranks,
stage 2 the gradients too, stage 3 the weights. What is private in DeepSpeed 0.19 and used here:
`overflow`; of stages 1 and 2 `_hp_mapping` of a parameter, `update_lp_params`, and the flat fp32 partition
that each inner parameter group holds; of stage 3 `fp32_partitioned_groups_flat`, their fp16 twins,
`persistent_parameters` and `checkpoint_event_epilogue`. tests/distributed/test_zero_contract.py fails when
one of them changes its meaning.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.checkpoint.layout import GroupLayout, Kind
from gpt.config import RunConfig
from gpt.distributed import World
from gpt.model import GPT
from gpt.optimizer import build_optimizer, parameter_groups, set_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("master", *MOMENTS)
_HYPERPARAMETERS = ("betas", "eps", "weight_decay", "lr_multiplier")


def deepspeed_config(run: RunConfig, world_size: int, *, has_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for `run`: generated, never accepted from a user, since it ignores misspelt keys."""
    accumulation = run.micro_batches(world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.batch.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.grad_clip,
        "zero_optimization": {
            "stage": run.zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": has_gpu,
        },
        "steps_per_print": 2**62,
    }
    if run.precision == "bf16":
        # Non-finite gradients skip the update instead of reaching the weights; off by default in bf16.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if accumulation > 1:  # sums over micro-batches lose bits in bf16, DeepSpeed's default
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


@dataclass(frozen=True)
class StatePart:
    """A stretch of a group's fp32 state on this rank: elements `start` to `end` of its logical vector."""

    group: str
    state: str
    start: int
    end: int
    tensor: Tensor


class Engine:
    """A GPT under ZeRO: loss and gradients, the update, and this rank's part of the state."""

    def __init__(self, model: GPT, run: RunConfig, world: World) -> None:
        deepspeed = _import_deepspeed(world.device)
        self.run, self.world, self.model = run, world, model
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, run.optimizer),
            config=deepspeed_config(run, world.size, has_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
        self._inner: torch.optim.Optimizer = self._zero.optimizer
        self._state = (_ShardedState if run.zero.stage == 3 else _FlatState)(self._zero, model, world, shapes)

    def forward_backward(self, loss_scale: float, *inputs: Any, is_last: bool) -> Tensor:
        """The model's loss for one micro-batch, its gradient times `loss_scale` accumulated.

        `is_last` says whether the step ends with it: in a batch ramp steps differ in their micro-batches.
        DeepSpeed averages over ranks and micro-batches; both are multiplied in here, so that what is
        left is the plain sum times `loss_scale`.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(*inputs)
        average = self.world.size * self.run.micro_batches(self.world.size)
        self._engine.backward(loss * (loss_scale * average))
        return loss.detach()

    def step(self, lr: float) -> None:
        """Count one micro-batch; after the last of a step, clip and update with rate `lr`."""
        set_rate(self._inner, lr)
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; inf when it was not finite."""
        return float(self._engine.get_global_grad_norm())

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was left out because its gradient was not finite."""
        return bool(getattr(self._zero, "overflow", False))

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, skipped steps left out."""
        moments = self._inner.state[self._state.partitions[0]]
        return int(moments["step"].item()) if moments else 0

    @property
    def layout(self) -> Kind:
        """How the state is cut over the ranks."""
        return self._state.kind

    @property
    def parameters(self) -> tuple[ParameterEntry, ...]:
        """Every parameter, and where it stands in the state of its group."""
        return self._state.parameters

    @property
    def groups(self) -> tuple[GroupEntry, ...]:
        """The optimizer's groups, in order."""
        return self._state.groups

    def state(self) -> Iterator[StatePart]:
        """This rank's part of the fp32 state without padding, in the order of its file: views, not copies."""
        return self._state.parts()

    def prepare_load(self, optimizer_steps: int) -> None:
        """Make sure that every tensor of `state()` exists, before it is filled from a checkpoint."""
        for partition in self._state.partitions:
            moments = self._inner.state[partition]
            # fused AdamW keeps its step count beside the moments
            moments["step"] = torch.tensor(float(optimizer_steps), device=partition.device)
            for name in MOMENTS:
                moments.setdefault(name, torch.zeros_like(partition.data))

    def finish_load(self) -> None:
        """Refresh the model's weights from the masters."""
        self._state.refresh_weights()


class _FlatState:
    """Stages 1 and 2: each group is one flat vector, cut into equal parts."""

    kind: Kind = "flat"

    def __init__(self, zero: Any, model: GPT, world: World, shapes: dict[str, tuple[int, ...]]) -> None:
        self._zero, self._rank = zero, world.rank
        self.partitions: list[Tensor] = [group["params"][0] for group in zero.optimizer.param_groups]
        sizes = [partition.numel() for partition in self.partitions]
        self.parameters, self.groups, self._layouts = _tables(self.kind, zero, model, world, shapes, sizes)
        # The closed form must be what DeepSpeed did.
        by_name = dict(model.named_parameters())
        starts = {group.name: self._layouts[group.name].extents(world.rank)[0][0] for group in self.groups}
        for entry in self.parameters:
            mapping = by_name[entry.name]._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                reported = starts[entry.group] + mapping.hp_fragment_address.start
                assert reported == entry.offset + mapping.lp_fragment_address.start, entry.name

    def parts(self) -> Iterator[StatePart]:
        for group, partition in zip(self.groups, self.partitions, strict=True):
            ((start, end),) = self._layouts[group.name].extents(self._rank)
            moments = self._zero.optimizer.state[partition]
            for state in STATES:
                flat = partition.data if state == "master" else moments[state]
                yield StatePart(group.name, state, start, end, flat[: end - start])

    def refresh_weights(self) -> None:
        self._zero.update_lp_params()


class _ShardedState:
    """Stage 3: each parameter is cut into equal parts."""

    kind: Kind = "sharded"

    def __init__(self, zero: Any, model: GPT, world: World, shapes: dict[str, tuple[int, ...]]) -> None:
        self._zero, self._rank = zero, world.rank
        self._by_name = dict(model.named_parameters())
        self.partitions: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        sizes = [1] * len(zero.optimizer.param_groups)
        self.parameters, self.groups, self._layouts = _tables(self.kind, zero, model, world, shapes, sizes)

    def parts(self) -> Iterator[StatePart]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for group in self.groups:
            members = [entry for entry in self.parameters if entry.group == group.name]
            extents = self._layouts[group.name].extents(self._rank)
            for state in STATES:
                for entry, (start, end) in zip(members, extents, strict=True):
                    parameter = self._by_name[entry.name]
                    padded = (
                        safe_get_local_fp32_param(parameter)
                        if state == "master"
                        else safe_get_local_optimizer_state(parameter, state)
                    )
                    yield StatePart(group.name, state, start, end, padded.data[: end - start])

    def refresh_weights(self) -> None:
        zero = self._zero
        for i, flat in enumerate(zero.fp16_partitioned_groups_flat):
            flat.data.copy_(zero.fp32_partitioned_groups_flat[i].data)
            views = zero.unflatten(flat, zero.fp16_partitioned_groups[i])
            for part, view in zip(zero.fp16_partitioned_groups[i], views, strict=True):
                part.data = view.data
        if zero.persistent_parameters:  # small ones are kept whole on every rank: cut, then gather again
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()


def _tables(
    kind: Kind,
    zero: Any,
    model: GPT,
    world: World,
    shapes: dict[str, tuple[int, ...]],
    partition_numels: list[int],
) -> tuple[tuple[ParameterEntry, ...], tuple[GroupEntry, ...], dict[str, GroupLayout]]:
    """Parameters, groups and cuts in closed form; `shapes` are those before stage 3 takes them away."""
    parameters: list[ParameterEntry] = []
    groups: list[GroupEntry] = []
    layouts = {}
    inner_groups = {str(group["name"]): group for group in zero.optimizer.param_groups}
    for (name, members), partition_numel in zip(
        parameter_groups(model).items(), partition_numels, strict=True
    ):
        offset = 0
        for parameter_name, _ in members:
            shape = shapes[parameter_name]
            parameters.append(ParameterEntry(name=parameter_name, shape=shape, group=name, offset=offset))
            offset += prod(shape)
        groups.append(
            GroupEntry(
                name=name,
                numel=offset,
                partition_numel=partition_numel,
                states=STATES,
                hyperparameters={key: inner_groups[name][key] for key in _HYPERPARAMETERS},
            )
        )
        layouts[name] = GroupLayout(kind, world.size, [prod(shapes[n]) for n, _ in members], partition_numel)
    return tuple(parameters), tuple(groups), layouts


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed's autotuner takes MLflow along where it is installed: 2 s of every start, for nothing.
    was_loaded = "mlflow" in sys.modules
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    import deepspeed

    # It still calls this torch function by its old name, once a step.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    if not was_loaded:
        del sys.modules["mlflow"]
    # Its Muon, which nothing here uses, decorates with torch.compile: that alone would load the compiler.
    with patch.object(torch, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its shared-memory collectives compile for 40 s at first use and raise without a compiler; to ask
        # which ops could be built takes 2 s. gloo does without any of them.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
