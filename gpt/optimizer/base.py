"""What an optimizer of a run offers to ZeRO and to checkpoints beyond torch's interface."""

import torch
from torch import Tensor

from gpt.optimizer.whole_matrices import MatrixExchange


class RunOptimizer(torch.optim.Optimizer):
    """A torch optimizer over named groups. Its state can be created before the first step.

    Its constructor takes the groups (gpt.optimizer.build), the OptimizerConfig, and the dtype in which the
    network computes. Its parameters are in fp32: whole ones, or the flat partitions that ZeRO makes of them.
    """

    # torch decorates this method with one that loads its compiler, which costs a second of every start.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of `parameter` before its first update.

        It holds each state that the parameter's GroupSpec names, in the shape of `parameter`. At least one
        group also keeps the scalar "step", from which a checkpoint takes the number of updates.
        """
        raise NotImplementedError

    def use_exchange(self, parameter: Tensor, exchange: MatrixExchange) -> None:
        """Update `parameter` through `exchange`, which lays its parts together to whole matrices.

        Called before the first step for each parameter of a group that `needs_whole_matrices`.
        """
        raise NotImplementedError
