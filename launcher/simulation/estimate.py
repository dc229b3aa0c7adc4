"""The scenario of a run on a cluster, before it has run there: what is configured, measured or assumed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt.config.run import RunConfig
from gpt.saving.save_interval import RECOVERY_S
from launcher.preflight.plan import checkpoint_bytes
from launcher.simulation.history import History
from launcher.simulation.scenario import Scenario

# Assumed where no earlier run was measured. A GPU copies its state to pinned host memory at 10 GB/s or more
# when all GPUs of a node copy at once; shared file systems take about 1 GB/s from each node.
COPY_BYTES_PER_S = 10e9
DISK_BYTES_PER_S = 1e9


def scenario_of(
    config: RunConfig,
    nodes: int,
    processes_per_node: int,
    work_s: float,
    history: History,
    disk_bytes_per_s: float = DISK_BYTES_PER_S,
) -> Scenario:
    """The scenario of the resolved `config` on `nodes`, where it takes `work_s` without interruptions."""
    total = checkpoint_bytes(config)
    transfer_s = total / nodes / disk_bytes_per_s
    stall_s = total / nodes / processes_per_node / COPY_BYTES_PER_S
    if not config.checkpoint.asynchronous:
        stall_s = transfer_s
    stall_s = history.stall_s if history.stall_s is not None else stall_s
    save_s = history.save_s if history.save_s is not None else transfer_s
    return Scenario(
        nodes=nodes,
        work_s=work_s,
        node_failure_rate=history.node_failure_rate,
        hang_s=config.launch.hang_timeout_s,
        start_s=history.start_s if history.start_s is not None else RECOVERY_S,
        load_s=transfer_s,
        interval_s=_interval_s(config, work_s),
        stall_s=stall_s,
        save_s=max(stall_s, save_s),
    )


def _interval_s(config: RunConfig, work_s: float) -> float | None:
    """The configured time between two saves; None when the run chooses the best one."""
    checkpoint = config.checkpoint
    wanted = [60 * checkpoint.every_minutes] if checkpoint.every_minutes is not None else []
    if checkpoint.every_steps is not None:
        wanted.append(checkpoint.every_steps * work_s / config.total_steps)
    return None if checkpoint.interval == "auto" else min(wanted, default=None)


@dataclass(frozen=True)
class Lever:
    """A change of the run or the cluster, and the scenario with it."""

    name: str
    scenario: Scenario


def levers(scenario: Scenario) -> Iterator[Lever]:
    """What could be changed, one thing at a time."""
    if scenario.interval_s is not None:
        best = replace(scenario, interval_s=None)
        yield Lever(f"save every {best.save_interval_s / 60:.1f} min, the best interval", best)
    spares = max(1, scenario.nodes // 50)
    yield Lever(
        f"{spares} more spare node{'s' if spares > 1 else ''}",
        replace(scenario, spare_nodes=scenario.spare_nodes + spares),
    )
    yield Lever(
        "start and load in half the time",
        replace(scenario, start_s=scenario.start_s / 2, load_s=scenario.load_s / 2),
    )
    yield Lever("wait half as long in the queue", replace(scenario, queue_s=scenario.queue_s / 2))
    yield Lever("notice hangs in half the time", replace(scenario, hang_s=scenario.hang_s / 2))
    yield Lever("save without stopping the training", replace(scenario, stall_s=scenario.stall_s / 100))
    yield Lever("half as many failures", replace(scenario, node_failure_rate=scenario.node_failure_rate / 2))
