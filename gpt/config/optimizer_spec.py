"""The table of optimizers. Config, parameter groups, memory plan and ZeRO all read it. Torch-free.

To add an optimizer, add its row to OPTIMIZERS here and its class to gpt.optimizer.build.OPTIMIZER_CLASSES.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gpt.config.model import ModelConfig

Shape = tuple[int, ...]

MASTER = "master"  # the fp32 weights, which every group keeps


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that one rule updates with one set of hyperparameters."""

    name: str
    rule: str  # how the log names the update
    states: tuple[str, ...]  # kept for every element, in the dtype of optimizer.moments
    fields: tuple[str, ...]  # fields of [optimizer] that the update reads, besides rate and decay
    has_weight_decay: bool = True
    is_scaled_by_width: bool = False  # muP scales its rate and decay
    needs_whole_matrices: bool = False  # else ZeRO may cut a parameter anywhere

    @property
    def checkpointed_states(self) -> tuple[str, ...]:
        """The states in the order of a checkpoint, which begins with the master weights."""
        return (MASTER, *self.states)

    def bytes_per_parameter(self, moment_bytes: int) -> int:
        """Bytes kept for an element: the fp32 master weight, and states of `moment_bytes` each."""
        return 4 + moment_bytes * len(self.states)


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer: its groups, in a checkpoint's order, and the rule that assigns parameters to them."""

    groups: tuple[GroupSpec, ...]
    group_of: Callable[[str, Shape, ModelConfig], str]  # (name, shape, model) of a parameter → group

    def group(self, name: str) -> GroupSpec:
        """The group `name`. Raises KeyError if the optimizer has no such group."""
        return {group.name: group for group in self.groups}[name]

    @property
    def needs_whole_matrices(self) -> bool:
        """Whether one of its groups needs whole matrices, which ZeRO otherwise cuts."""
        return any(group.needs_whole_matrices for group in self.groups)

    @property
    def fields(self) -> frozenset[str]:
        """The fields of [optimizer] that its groups read, besides rate and decay."""
        return frozenset(field for group in self.groups for field in group.fields)

    @property
    def supports_mup(self) -> bool:
        """Whether one of its groups follows muP's rates."""
        return any(group.is_scaled_by_width for group in self.groups)


def _is_block_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is a matrix inside a block: neither embedding, head, norm nor bias."""
    return len(shape) >= 2 and name.startswith("blocks.")


def _adamw_group(name: str, shape: Shape, model: ModelConfig) -> str:
    if len(shape) < 2:
        return "no_decay"
    return "hidden" if _is_block_matrix(name, shape) and model.initialization == "mup" else "decay"


def _muon_group(name: str, shape: Shape, model: ModelConfig) -> str:  # noqa: ARG001
    if len(shape) < 2:
        return "no_decay"
    return "muon" if _is_block_matrix(name, shape) else "decay"


_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAMW_FIELDS = ("betas", "eps")
_DECAY = GroupSpec("decay", "AdamW", _MOMENTS, _ADAMW_FIELDS)
_HIDDEN = GroupSpec("hidden", "AdamW", _MOMENTS, _ADAMW_FIELDS, is_scaled_by_width=True)
_NO_DECAY = GroupSpec("no_decay", "AdamW", _MOMENTS, _ADAMW_FIELDS, has_weight_decay=False)
_MUON = GroupSpec("muon", "Muon", ("momentum_buffer",), ("momentum",), needs_whole_matrices=True)

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec((_DECAY, _HIDDEN, _NO_DECAY), _adamw_group),
    "muon": OptimizerSpec((_DECAY, _MUON, _NO_DECAY), _muon_group),
}
"""The optimizers by their name in `optimizer.name`."""
