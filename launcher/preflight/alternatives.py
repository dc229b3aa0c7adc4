"""Other ways to run the same config: the GPUs that finish it in time, and the memory of other settings."""

from dataclasses import dataclass
from math import ceil

from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from launcher.cluster import ClusterConfig
from launcher.preflight.memory import memory
from launcher.preflight.plan import available_bytes, plan

_MOST_NODES_MORE = 64  # how far above the least number of nodes one is sought that divides the batch


@dataclass(frozen=True)
class GpuCount:
    """GPUs that finish a run within a number of days."""

    gpus: int
    nodes: int
    days: float


@dataclass(frozen=True)
class Setting:
    """The memory of a rank with another ZeRO stage and recomputation; `fits` is None if that is unknown."""

    stage: int
    recompute: str
    peak: int
    fits: bool | None
    is_own: bool


def gpus_for(days: float, config: RunConfig, cluster: ClusterConfig, mfu: float) -> GpuCount:
    """The smallest number of whole nodes that trains `config` within `days` and divides its batch.

    Raises ConfigError when the cluster file names no accelerator, or when no number of nodes fits.
    """
    hours = plan(config, cluster, None, mfu).gpu_hours
    if hours is None or not cluster.gpus_per_node:
        raise ConfigError("--days needs a cluster file with gpus_per_node and accelerator.")
    least = max(1, ceil(hours / 24 / days / cluster.gpus_per_node))
    for nodes in range(least, least + _MOST_NODES_MORE):
        world_size = nodes * cluster.gpus_per_node
        if config.batch_problem(world_size) is None:
            return GpuCount(world_size, nodes, hours / world_size / 24)
    raise ConfigError(
        f"--days {days:g}: {hours:,.0f} GPU hours need at least {least * cluster.gpus_per_node} GPUs, and no "
        f"number of nodes from {least} on divides batch.global_batch_tokens = "
        f"{config.batch.global_batch_tokens}. Use a smaller batch.micro_batch, a larger batch or more days."
    )


def settings(config: RunConfig, cluster: ClusterConfig) -> list[Setting]:
    """The memory at each ZeRO stage with each kind of recomputation, the run's own setting among them."""
    available, found = available_bytes(cluster), []
    for stage in (1, 2, 3):
        for recompute in ("none", "selective", "full"):
            zero = config.zero.model_copy(update={"stage": stage})
            model = config.model.model_copy(update={"recompute": recompute})
            other = config.model_copy(update={"zero": zero, "model": model})
            peak = memory(other, cluster.world_size, on_cpu=cluster.gpus_per_node == 0).peak
            own = (config.zero.stage, config.model.recompute) == (stage, recompute)
            fits = None if available is None else peak <= available
            found.append(Setting(stage, recompute, peak, fits, own))
    return found
