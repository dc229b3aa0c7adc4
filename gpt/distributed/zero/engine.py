"""A GPT under DeepSpeed ZeRO: loss and gradients, the update, and this rank's part of the state.

Private in DeepSpeed 0.19 and used here: `overflow`, and of fp16 the four numbers of its loss scaler; state.py
and patches.py name what they use. tests/distributed/test_zero_contract.py fails when one of them changes its
meaning.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint.format import GroupEntry, ParameterEntry
from gpt.checkpoint.layout import Kind
from gpt.config.run import RunConfig
from gpt.distributed.world import World
from gpt.distributed.zero.build import DTYPES
from gpt.distributed.zero.deepspeed_config import deepspeed_config
from gpt.distributed.zero.patches import check_overflow_once, import_deepspeed, keep_loss_scale_within_step
from gpt.distributed.zero.state import FlatState, ShardedState, StatePart
from gpt.model.gpt import GPT
from gpt.model.hardware import is_cpu
from gpt.optimizer.base import RunOptimizer
from gpt.optimizer.build import build_optimizer, set_rate
from gpt.optimizer.whole_matrices import MatrixExchange

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """A GPT under ZeRO: loss and gradients, the update, and this rank's part of the state."""

    def __init__(self, model: GPT, run: RunConfig, world: World) -> None:
        deepspeed = import_deepspeed(world.device)
        self.run, self.world, self.model = run, world, model
        self.initial_lr = 0.0  # where the warmup starts; gpt.training.auto_warmup may raise it
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, run.optimizer, DTYPES[run.precision]),
            config=deepspeed_config(run, world.size, has_gpu=not is_cpu(world.device)),
            dist_init_required=False,
        )
        self._inner: RunOptimizer = self._zero.optimizer
        if run.zero.stage < 3 and run.zero.offload_optimizer == "none":
            check_overflow_once(self._zero)
        if run.precision == "fp16":
            keep_loss_scale_within_step(self._zero)
        self._ends_step = False
        self._before_update: Callable[[], None] | None = None
        self._has_updates = False  # whether the state being loaded has seen an update
        kind = ShardedState if run.zero.stage == 3 else FlatState
        self._state = kind(self._zero, model, run, world)
        for group in (group for group in run.optimizer.spec.groups if group.needs_whole_matrices):
            for partition, matrices in self._state.sharded_matrices(group.name):
                self._inner.use_exchange(partition, MatrixExchange(matrices, world.rank, world.size))

    def forward_backward(self, loss_scale: float, *inputs: Any, is_last: bool) -> Tensor:
        """Return the model's loss on one micro-batch and accumulate its gradient times `loss_scale`.

        `is_last` marks the last micro-batch of the step; a batch ramp changes their number. DeepSpeed
        averages over ranks and micro-batches. The loss is multiplied by both counts first, so that the
        gradient is the plain sum times `loss_scale`.
        """
        self._ends_step = is_last
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(*inputs)
        average = self.world.size * self.run.micro_batches(self.world.size)
        # 0 · loss makes the gradient non-finite when the loss is, so that the update is skipped.
        self._engine.backward(loss * (loss_scale * average + 0.0 * loss.detach()))
        return loss.detach()

    def step(self, lr: float) -> dict[str, Tensor]:
        """Count one micro-batch; after the last one of a step, clip the gradient and update with rate `lr`.

        Returns the numbers of the step by their names in metrics.jsonl, as scalars on the device; nothing
        before the last micro-batch.
        """
        set_rate(self._inner, lr)
        if self._ends_step and self._before_update is not None:
            self._before_update()
            self._before_update = None
        self._engine.step()
        if not self._ends_step:
            return {}
        if self.run.precision == "fp16":
            self._zero.loss_scaler.update_scale(self.was_skipped)
        if self.was_skipped and self.run.zero.stage < 3 and self.run.zero.offload_optimizer == "cpu":
            # DeepSpeed keeps non-finite gradients when they accumulate in fp32: every later step would be
            # skipped too.
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        # Over all ranks and before clipping; inf when the gradient is not finite.
        norm = self._engine.get_global_grad_norm()
        return {"train/grad_norm": torch.as_tensor(norm, device=self.world.device)}

    def before_next_update(self, action: Callable[[], None]) -> None:
        """Call `action` once, when the next update is about to change the state."""
        self._before_update = action

    @property
    def was_skipped(self) -> bool:
        """Whether the last step skipped its update because the gradient was not finite."""
        return bool(getattr(self._zero, "overflow", False))

    @property
    def optimizer_steps(self) -> int:
        """The number of updates so far, without the skipped ones."""
        counts = [moments["step"] for moments in self._inner.state.values() if "step" in moments]
        return int(counts[0].item()) if counts else 0

    @property
    def scalars(self) -> dict[str, float]:
        """The rest of the state: where the warmup started, and the dynamic loss scale of fp16."""
        scalars = {"initial_lr": self.initial_lr}
        if self.run.precision == "fp16":
            scaler = self._zero.loss_scaler
            scalars |= {f"loss_scaler.{name}": float(getattr(scaler, name)) for name in _SCALER}
        return scalars

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Continue with the scalars of a checkpoint; a loss scale that it lacks keeps its initial value."""
        self.initial_lr = scalars.get("initial_lr", 0.0)
        for name in _SCALER if self.run.precision == "fp16" else ():
            value = scalars.get(f"loss_scaler.{name}")
            if value is not None:
                setattr(self._zero.loss_scaler, name, value if name == "cur_scale" else int(value))

    @property
    def layout(self) -> Kind:
        """How the state is sharded over the ranks."""
        return self._state.kind

    @property
    def parameters(self) -> tuple[ParameterEntry, ...]:
        """Every parameter and its offset in the state of its group."""
        return self._state.parameters

    @property
    def groups(self) -> tuple[GroupEntry, ...]:
        """The optimizer's groups, in order."""
        return self._state.groups

    def state(self) -> Iterator[StatePart]:
        """This rank's part of the fp32 state, as views without padding, in the order of its file."""
        return self._state.parts()

    @contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        """Restores the state on exit, whatever steps were taken inside. Only before the first update."""
        masters, scalars = [partition.detach().clone() for partition in self._state.partitions], self.scalars
        yield
        for partition, master in zip(self._state.partitions, masters, strict=True):
            partition.data.copy_(master)
        self._inner.state.clear()
        self.load_scalars(scalars)
        self._state.refresh_weights()

    def prepare_load(self, optimizer_steps: int) -> None:
        """Create every tensor of `state()`, so that a checkpoint can fill them."""
        for partition in self._state.partitions:
            moments = self._inner.state[partition]
            if not moments:
                moments.update(self._inner.new_state(partition))
            if "step" in moments:
                moments["step"].fill_(optimizer_steps)
        self._has_updates = optimizer_steps > 0

    def finish_load(self) -> None:
        """Refresh the model's weights from the loaded masters."""
        if not self._has_updates:
            self._inner.state.clear()  # the first update chooses where the second moment starts
        self._state.refresh_weights()
