"""DeepSpeed ZeRO: the only file that writes its config or touches its internals.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) stage 1 shards the optimizer's state over the ranks,
stage 2 the gradients too, stage 3 the weights. What is private in DeepSpeed 0.19 and used here:
`overflow`; of stages 1 and 2 `_hp_mapping` of a parameter, `update_lp_params`, and the flat fp32 partition
that each inner parameter group holds, `check_overflow`, `scaled_global_norm`, `unscale_and_clip_grads`,
`averaged_gradients` and the function that clips; of stage 3 `fp32_partitioned_groups_flat`, their fp16 twins,
`fp16_groups`, `persistent_parameters` and `checkpoint_event_epilogue`; of fp16 `_update_scale` and the
four numbers of its loss scaler; and the list of optimizers that it knows.
tests/distributed/test_zero_contract.py fails when one of them changes its meaning.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.checkpoint.layout import GroupLayout, Kind
from gpt.config.model import ModelConfig
from gpt.config.run import RunConfig
from gpt.config.zero_sizes import zero_sizes
from gpt.distributed.world import World
from gpt.model.gpt import GPT
from gpt.model.initialization import initialize
from gpt.optimizer.base import RunOptimizer
from gpt.optimizer.build import OPTIMIZER_CLASSES, build_optimizer, set_rate
from gpt.optimizer.parameter_groups import hyperparameters, parameter_entries, sizes_by_group, states
from gpt.optimizer.whole_matrices import Fragment, MatrixExchange, ShardedMatrices

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def deepspeed_config(run: RunConfig, world_size: int, *, has_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for `run`: generated, never accepted from a user, since it ignores misspelt keys."""
    accumulation = run.micro_batches(world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.batch.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.grad_clip,
        "zero_optimization": _zero_optimization(run, has_gpu=has_gpu),
        # With offload torch's AdamW updates on the host: unlike DeepSpeedCPUAdam it needs no compiler there.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if run.precision == "bf16":
        # Non-finite gradients skip the update instead of reaching the weights; off by default in bf16.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if run.precision == "fp16":
        # Mixed Precision Training (arXiv:1710.03740, section 3.2), with the numbers of Apex.
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    if run.precision != "fp32" and accumulation > 1:
        # Sums over micro-batches lose bits in 16 bits, DeepSpeed's default.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_optimization(run: RunConfig, *, has_gpu: bool) -> dict[str, Any]:
    """The sizes follow the model: a block's gradients are reduced while the one before it computes."""
    zero, sizes = run.zero, zero_sizes(run)
    config: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": has_gpu,
        "reduce_bucket_size": sizes.bucket_numel,
    }
    if zero.offload_optimizer == "cpu":
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
    if zero.stage < 3:
        return config
    config |= {
        "stage3_prefetch_bucket_size": sizes.prefetch_numel,
        "stage3_param_persistence_threshold": sizes.whole_below_numel,
        "zero_quantized_weights": zero.quantized_weights,
        "zero_quantized_gradients": zero.quantized_gradients,
        "zero_hpz_partition_size": zero.secondary_shards,
    }
    if zero.offload_parameters == "cpu":
        config["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    return config


def build_model(run: RunConfig, world: World, *, is_resumed: bool = False) -> GPT:
    """The network of `run` with its initial weights, in place; at stage 3 no rank ever holds it whole.

    Where it `is_resumed` the weights are without values: a checkpoint's take their place. Raises ConfigError
    when the attention kernel that the config names cannot run here.
    """
    dtype = DTYPES[run.precision]
    if run.zero.stage < 3:
        model = GPT(run.model)
        if not is_resumed:
            model.initialize(run.seed)
        return model.place(world.device, dtype, world.sequence)
    with torch.device("meta"):
        model = GPT(run.model)
    model.place(world.device, dtype, world.sequence)
    parameters = _cut_one_by_one(model, run, world)
    if is_resumed:
        for _ in parameters:
            pass
    else:
        initialize(parameters, run.model, run.seed)
    return model


def _cut_one_by_one(model: GPT, run: RunConfig, world: World) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter, whole while the caller fills it, and then cut into the ranks' shards."""
    deepspeed = _import_deepspeed(world.device)
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    config = deepspeed_config(run, world.size, has_gpu=world.device.type == "cuda")
    for name, planned in list(model.named_parameters()):
        parameter = torch.nn.Parameter(torch.empty(planned.shape))
        yield name, parameter
        parameter.data = parameter.data.to(device=world.device, dtype=DTYPES[run.precision])
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
        if planned is model.head.weight:  # where it is tied
            model.head.weight = parameter
        deepspeed.zero.Init(
            torch.nn.ParameterList([parameter]), config_dict_or_path=config, dtype=DTYPES[run.precision]
        )


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
        self.initial_lr = 0.0  # where the warmup starts; `gpt.training.auto_warmup` may settle on more
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, run.optimizer, DTYPES[run.precision]),
            config=deepspeed_config(run, world.size, has_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
        self._inner: RunOptimizer = self._zero.optimizer
        if run.zero.stage < 3 and run.zero.offload_optimizer == "none":
            _look_once(self._zero)
        if run.precision == "fp16":
            # DeepSpeed raises it in the middle of a step and divides gradients of the old one by the new.
            self._zero._update_scale = lambda has_overflow=False: None  # noqa: ARG005
        self._ends_step = False
        kind = _ShardedState if run.zero.stage == 3 else _FlatState
        self._state = kind(self._zero, model, run, world)
        for group in (group for group in run.optimizer.spec.groups if group.needs_whole_matrices):
            for partition, wholes in self._state.wholes(group.name):
                self._inner.use_exchange(partition, MatrixExchange(wholes, world.rank, world.size))

    def forward_backward(self, loss_scale: float, *inputs: Any, is_last: bool) -> Tensor:
        """The model's loss for one micro-batch, its gradient times `loss_scale` accumulated.

        `is_last` says whether the step ends with it: in a batch ramp steps differ in their micro-batches.
        DeepSpeed averages over ranks and micro-batches; both are multiplied in here, so that what is
        left is the plain sum times `loss_scale`.
        """
        self._ends_step = is_last
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(*inputs)
        average = self.world.size * self.run.micro_batches(self.world.size)
        # 0 · loss: one that is not finite makes the gradient so, and the update is left out.
        self._engine.backward(loss * (loss_scale * average + 0.0 * loss.detach()))
        return loss.detach()

    def step(self, lr: float) -> None:
        """Count one micro-batch; after the last of a step, clip and update with rate `lr`."""
        set_rate(self._inner, lr)
        self._engine.step()
        if not self._ends_step:
            return
        if self.run.precision == "fp16":
            self._zero.loss_scaler.update_scale(self.was_skipped)
        if self.was_skipped and self.run.zero.stage < 3 and self.run.zero.offload_optimizer == "cpu":
            # DeepSpeed leaves them where they accumulate in fp32: all later steps would be skipped, too.
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient before clipping, on the device; inf when not finite."""
        norm = self._engine.get_global_grad_norm()
        return norm if isinstance(norm, Tensor) else torch.tensor(norm, device=self.world.device)

    @property
    def was_skipped(self) -> bool:
        """Whether the last step was left out because its gradient was not finite."""
        return bool(getattr(self._zero, "overflow", False))

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, skipped steps left out."""
        counts = [moments["step"] for moments in self._inner.state.values() if "step" in moments]
        return int(counts[0].item()) if counts else 0

    @property
    def scalars(self) -> dict[str, float]:
        """What else is state: where the warmup started, and the dynamic loss scale of fp16."""
        scalars = {"initial_lr": self.initial_lr}
        if self.run.precision == "fp16":
            scaler = self._zero.loss_scaler
            scalars |= {f"loss_scaler.{name}": float(getattr(scaler, name)) for name in _SCALER}
        return scalars

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Continue with those of a checkpoint; a loss scale that is not there starts anew."""
        self.initial_lr = scalars.get("initial_lr", 0.0)
        for name in _SCALER if self.run.precision == "fp16" else ():
            value = scalars.get(f"loss_scaler.{name}")
            if value is not None:
                setattr(self._zero.loss_scaler, name, value if name == "cur_scale" else int(value))

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

    @contextmanager
    def undone(self) -> Iterator[None]:
        """After it the state is that of before, whatever steps were taken in it; for before the first one."""
        masters, scalars = [partition.detach().clone() for partition in self._state.partitions], self.scalars
        yield
        for partition, master in zip(self._state.partitions, masters, strict=True):
            partition.data.copy_(master)
        self._inner.state.clear()
        self.load_scalars(scalars)
        self._state.refresh_weights()

    def prepare_load(self, optimizer_steps: int) -> None:
        """Make sure that every tensor of `state()` exists, before it is filled from a checkpoint."""
        for partition in self._state.partitions:
            moments = self._inner.state[partition]
            if not moments:
                moments.update(self._inner.new_state(partition))
            if "step" in moments:
                moments["step"].fill_(optimizer_steps)
        self._has_updates = optimizer_steps > 0

    def finish_load(self) -> None:
        """Refresh the model's weights from the masters."""
        if not self._has_updates:
            self._inner.state.clear()  # where the second moment starts is for the first update to say
        self._state.refresh_weights()


def _look_once(zero: Any) -> None:
    """Make stages 1 and 2 wait for the device once a step, for whether the gradient's norm is finite.

    DeepSpeed scans every gradient for overflow, waits, then takes the norm of each group in fp64, with a
    collective and two more waits each; where fp32 gradients accumulate it waits to know whether to clip. A
    gradient that is not finite has no finite norm, so that one look at the whole norm is enough.
    """
    if not hasattr(zero, "averaged_gradients"):
        import deepspeed.runtime.bf16_optimizer

        deepspeed.runtime.bf16_optimizer.clip_tensors_by_global_norm = _clip
        return

    def scaled_global_norm(norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        gradients = [g for group in zero.averaged_gradients.values() for g in group or () if g is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        return total.sqrt()

    def unscale_and_clip_grads(gradients: Sequence[Tensor], scaled_norm: Tensor) -> None:
        over = ((scaled_norm / zero.loss_scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
        for gradient in gradients:
            gradient.mul_(1.0 / (over * zero.loss_scale))

    zero.check_overflow = lambda partition_gradients=True: None  # noqa: ARG005
    zero.scaled_global_norm = scaled_global_norm
    zero.unscale_and_clip_grads = unscale_and_clip_grads


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> None:
    scale = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(scale)


class _FlatState:
    """Stages 1 and 2: each group is one flat vector, cut into equal parts."""

    kind: Kind = "flat"

    def __init__(self, zero: Any, model: GPT, run: RunConfig, world: World) -> None:
        self._zero, self._model, self._world = zero, run.model, world
        self.partitions: list[Tensor] = [group["params"][0] for group in zero.optimizer.param_groups]
        sizes = [partition.numel() for partition in self.partitions]
        self.parameters, self.groups, self._layouts = _tables(self.kind, run, world, sizes)
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
            ((start, end),) = self._layouts[group.name].extents(self._world.rank)
            for state in group.states:
                flat = _state_of(self._zero.optimizer, partition, state)
                yield StatePart(group.name, state, start, end, flat[: end - start])

    def wholes(self, group: str) -> Iterator[tuple[Tensor, list[ShardedMatrices]]]:
        """Each partition of `group` with the parameters that are cut in it."""
        layout = self._layouts[group]
        wholes = []
        for entry in (entry for entry in self.parameters if entry.group == group):
            pieces = layout.locate(entry.offset, entry.offset + entry.numel)
            places = [(piece.rank, piece.offset, piece.length) for piece in pieces]
            wholes.append(_whole(entry.name, self._model, entry.shape, places))
        yield self.partitions[[entry.name for entry in self.groups].index(group)], wholes

    def refresh_weights(self) -> None:
        self._zero.update_lp_params()


class _ShardedState:
    """Stage 3: each parameter is cut into equal parts."""

    kind: Kind = "sharded"

    def __init__(self, zero: Any, model: GPT, run: RunConfig, world: World) -> None:
        self._zero, self._model, self._world = zero, run.model, world
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.partitions: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        sizes = [1] * len(zero.optimizer.param_groups)
        self.parameters, self.groups, self._layouts = _tables(self.kind, run, world, sizes)

    def parts(self) -> Iterator[StatePart]:
        where = {name: (partition, at) for name, partition, at in self._places()}
        for group in self.groups:
            members = [entry for entry in self.parameters if entry.group == group.name]
            extents = self._layouts[group.name].extents(self._world.rank)
            for state in group.states:
                for entry, (start, end) in zip(members, extents, strict=True):
                    partition, at = where[entry.name]
                    flat = _state_of(self._zero.optimizer, partition, state)
                    yield StatePart(group.name, state, start, end, flat[at : at + end - start])

    def _places(self) -> Iterator[tuple[str, Tensor, int]]:
        """Each parameter with the fp32 partition that holds its shard, and where the shard begins there."""
        for partition, members in zip(self.partitions, self._zero.fp16_groups, strict=True):
            at = 0
            for parameter in members:
                yield self._names[id(parameter)], partition, at
                at += -(-parameter.ds_numel // self._world.size)

    def wholes(self, group: str) -> Iterator[tuple[Tensor, list[ShardedMatrices]]]:
        """Each partition of `group` with the parameters that are cut in it."""
        entries = {entry.name: entry for entry in self.parameters if entry.group == group}
        wholes: dict[Tensor, list[ShardedMatrices]] = {}
        for name, partition, at in self._places():
            if name not in entries:
                continue
            shard = -(-entries[name].numel // self._world.size)
            sizes = [
                max(0, min(shard, entries[name].numel - rank * shard)) for rank in range(self._world.size)
            ]
            places = [(rank, at, size) for rank, size in enumerate(sizes)]
            whole = _whole(name, self._model, entries[name].shape, places)
            wholes.setdefault(partition, []).append(whole)
        yield from wholes.items()

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


def _state_of(optimizer: torch.optim.Optimizer, partition: Tensor, state: str) -> Tensor:
    """One state of a partition, flat; zeros where no update was made yet."""
    if state == "master":
        return partition.data
    moments = optimizer.state.get(partition) or {}
    return moments[state] if state in moments else torch.zeros_like(partition.data)


def _whole(
    name: str, model: ModelConfig, shape: tuple[int, ...], places: Sequence[tuple[int, int, int]]
) -> ShardedMatrices:
    """A parameter for Muon; queries, keys and values, and gate and value, are matrices of their own."""
    rows: tuple[int, ...] = (shape[0],)
    if name.endswith("attention.qkv.weight"):
        rows = tuple(heads * model.head_width for heads in (model.n_heads, model.kv_heads, model.kv_heads))
    elif name.endswith("ffn.up.weight") and model.is_gated:
        rows = (model.ffn_width, model.ffn_width)
    assert sum(rows) == shape[0], name
    return ShardedMatrices(rows, shape[1], tuple(Fragment(*place) for place in places if place[2]))


def _tables(
    kind: Kind, run: RunConfig, world: World, partition_numels: list[int]
) -> tuple[tuple[ParameterEntry, ...], tuple[GroupEntry, ...], dict[str, GroupLayout]]:
    """Parameters, groups and cuts in closed form."""
    parameters = parameter_entries(run.model, run.optimizer)
    groups: list[GroupEntry] = []
    layouts = {}
    for (name, sizes), partition_numel in zip(
        sizes_by_group(parameters).items(), partition_numels, strict=True
    ):
        groups.append(
            GroupEntry(
                name=name,
                numel=sum(sizes),
                partition_numel=partition_numel,
                states=states(name, run.optimizer),
                hyperparameters=hyperparameters(name, run.optimizer, run.model),
            )
        )
        layouts[name] = GroupLayout(kind, world.size, sizes, partition_numel)
    return parameters, tuple(groups), layouts


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
    # It warns of optimizers that it has not tested; ours are tested here, at every stage.
    known = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    known.extend(kind for kind in OPTIMIZER_CLASSES.values() if kind not in known)
    if device.type == "cpu":
        # torch computes in fp16 on every CPU, if slowly; DeepSpeed asks for a fast one.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        # Its shared-memory collectives compile for 40 s at first use and raise without a compiler; to ask
        # which ops could be built takes 2 s. gloo does without any of them.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
