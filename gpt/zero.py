"""DeepSpeed ZeRO: the only file that writes its config or touches its internals.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) stage 1 shards the optimizer's state over the ranks,
stage 2 the gradients too. What is private in DeepSpeed 0.19 and used here: `_hp_mapping` of a
parameter, `update_lp_params`, `overflow`, and the flat fp32 partition that each inner parameter group
holds; tests/distributed/test_zero_contract.py fails when one of them changes its meaning.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.config import RunConfig
from gpt.distributed import World
from gpt.model import GPT
from gpt.optimizer import build_optimizer, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("master", *MOMENTS)


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


class Engine:
    """A GPT under ZeRO: loss and gradients, the update, and this rank's part of the state."""

    def __init__(self, model: GPT, run: RunConfig, world: World) -> None:
        deepspeed = _import_deepspeed(world.device)
        self.run, self.world, self.model = run, world, model
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, run.optimizer),
            config=deepspeed_config(run, world.size, has_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
        self._inner: torch.optim.Optimizer = self._zero.optimizer
        self.parameters, self.groups = self._layout()

    def forward_backward(self, loss_scale: float, *inputs: Any) -> Tensor:
        """The model's loss for one micro-batch, its gradient times `loss_scale` accumulated.

        DeepSpeed averages over ranks and micro-batches; both are multiplied in here, so that what is
        left is the plain sum times `loss_scale`.
        """
        loss: Tensor = self._engine(*inputs)
        average = self.world.size * self.run.micro_batches(self.world.size)
        self._engine.backward(loss * (loss_scale * average))
        return loss.detach()

    def step(self, lr: float) -> None:
        """Count one micro-batch; after the last of a step, clip and update with rate `lr`."""
        for group in self._inner.param_groups:
            group["lr"] = lr
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
        for partition in self._partitions():
            return int(self._inner.state[partition]["step"].item()) if self._inner.state[partition] else 0
        return 0

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Group, state name, and this rank's flat fp32 part of it without padding: views, not copies."""
        for group, partition in zip(self.groups, self._partitions(), strict=True):
            start, end = group.owned(self.world.rank)
            moments = self._inner.state[partition]
            for state in STATES:
                flat = partition.data if state == "master" else moments[state]
                yield group.name, state, flat[: end - start]

    def prepare_load(self, optimizer_steps: int) -> None:
        """Make sure that every tensor of `state()` exists, before it is filled from a checkpoint."""
        for partition in self._partitions():
            moments = self._inner.state[partition]
            # fused AdamW keeps its step count beside the moments
            moments["step"] = torch.tensor(float(optimizer_steps), device=partition.device)
            for name in MOMENTS:
                moments.setdefault(name, torch.zeros_like(partition.data))

    def finish_load(self) -> None:
        """Refresh the model's weights from the masters."""
        self._zero.update_lp_params()

    def _partitions(self) -> list[Tensor]:
        return [group["params"][0] for group in self._inner.param_groups]

    def _layout(self) -> tuple[tuple[ParameterEntry, ...], tuple[GroupEntry, ...]]:
        """The flat layout in closed form, checked against the addresses that DeepSpeed reports."""
        parameters, groups = [], []
        members_by_group = parameter_groups(self.model)
        for inner, partition in zip(self._inner.param_groups, self._partitions(), strict=True):
            group_name, offset = str(inner["name"]), 0
            partition_start = self.world.rank * partition.numel()
            for name, parameter in members_by_group[group_name]:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    reported = partition_start + mapping.hp_fragment_address.start
                    assert reported == offset + mapping.lp_fragment_address.start, name
                parameters.append(
                    ParameterEntry(name=name, shape=tuple(parameter.shape), group=group_name, offset=offset)
                )
                offset += parameter.numel()
            hyperparameters = {key: inner[key] for key in ("betas", "eps", "weight_decay")}
            groups.append(
                GroupEntry(
                    name=group_name,
                    numel=offset,
                    partition_numel=partition.numel(),
                    states=STATES,
                    hyperparameters=hyperparameters,
                )
            )
        return tuple(parameters), tuple(groups)


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
