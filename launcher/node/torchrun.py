"""The command and the environment of torchrun on one node: everything that the workers get to know."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.environment import WorkerEnvironment
from gpt.run.failure_policy import Trigger
from gpt.run.run_dir import RunDir
from gpt.run.stop import STOP_SIGNALS
from launcher.cluster import ClusterConfig
from launcher.node.rendezvous import Rendezvous
from launcher.runs.code_snapshot import python_module
from launcher.scheduler.container import inside
from launcher.scheduler.protocol import NodeIdentity
from launcher.scheduler.registry import scheduler_of

# torchrun would die of a signal that it does not handle, and orphan its workers.
_FORWARDED = ",".join(number.name for number in (*STOP_SIGNALS, signal.SIGQUIT))
# How long torchrun waits between forwarding a signal and SIGKILL. The sender of the signal has a limit of its
# own (Slurm's grace time); torchrun must not be the one that cuts a save short.
_SHUTDOWN_TIMEOUT_S = 3600
# Nodes often have no route to the internet: a library that tries would hang in a connection, not fail.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# How torch's allocator is configured; the second name is the older one.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


@dataclass(frozen=True)
class GivenUp:
    """Why torchrun was ended although it would have tried again."""

    trigger: Trigger
    cause: str


@dataclass(frozen=True)
class TorchrunEnd:
    """torchrun's exit code, and whether a stop request killed the workers without saving.

    `error` is the last one that its workers printed before they belonged to an attempt.
    """

    code: int
    stopped_now: bool
    given_up: GivenUp | None = None
    error: str | None = None

    @property
    def cause(self) -> str:
        """Why the workers ended, if they left no result."""
        if self.given_up is not None:
            return self.given_up.cause
        error = f": {self.error}" if self.error is not None else ""
        return f"the workers ended without a result (torchrun: {self.code}){error}"


def torchrun_command(
    run: RunDir,
    config: RunConfig,
    cluster: ClusterConfig,
    identity: NodeIdentity,
    rendezvous: Rendezvous,
    logs: Path,
    mounts: Sequence[Path],
) -> list[str]:
    """torchrun with its c10d rendezvous, which restarts the workers of all nodes together.

    With the static rendezvous each node would restart on its own.
    """
    command = python_module(
        "torch.distributed.run",
        f"--nnodes={identity.nodes}",
        f"--nproc-per-node={cluster.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous.endpoint}",
        f"--rdzv-id={run.path.name}-{identity.job}-{identity.job_run}",
        f"--rdzv-conf=is_host={int(identity.is_first)}",
        f"--local-addr={rendezvous.address}",  # never a name lookup
        f"--max-restarts={config.launch.max_restarts}",
        "--monitor-interval=0.2",
        f"--signals-to-handle={_FORWARDED}",
        f"--shutdown-timeout={_SHUTDOWN_TIMEOUT_S}",
        f"--log-dir={logs}",  # the default is a folder in /tmp that nobody removes
        "-m",
        "gpt.train",
        str(run.path),
    )
    return inside(command, cluster, mounts)


def newest_generation(logs: Path) -> int:
    """How often the torchrun that logs to the folder `logs` has restarted its workers on this node.

    Its documented layout is LOGS/RENDEZVOUS_ID/attempt_N/RANK, with one attempt_N for each start.
    """
    numbers = (folder.name.rpartition("_")[2] for folder in logs.glob("*/attempt_*"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def worker_environment(
    cluster: ClusterConfig,
    identity: NodeIdentity,
    after_attempt: int,
    heartbeat: str,
    inherited: Mapping[str, str],
) -> dict[str, str]:
    """The environment of the workers: the node's, their identity, their cores or GPUs, the cluster file's.

    `after_attempt` is the newest attempt before this job run: workers end when a later one belongs to another
    job. `heartbeat` is the socket on which the node task receives heartbeats.
    """
    scheduler = scheduler_of(cluster.kind)
    environment = {
        **inherited,
        **WorkerEnvironment(
            job=identity.job,
            job_run=identity.job_run,
            after_attempt=after_attempt,
            can_requeue=scheduler.can_requeue,
            node=identity.node,
            node_name=identity.name,
            gpus_per_node=cluster.gpus_per_node,
            heartbeat=heartbeat,
        ).variables(),
    }
    if identity.nodes > 1:
        # The agents of several nodes count restarts separately, so a store that outlives a restart cannot
        # tell generations apart. This gives each generation a new store, on a port that torchrun finds.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if not cluster.gpus_per_node:
        cores = scheduler.core_count(inherited)
        environment["OMP_NUM_THREADS"] = str(max(1, cores // cluster.processes))
    elif (visible := scheduler.visible_gpus(cluster, inherited)) is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    if cluster.gpus_per_node and not _ALLOCATOR & (inherited.keys() | cluster.environment.keys()):
        # Gathered weights and activations differ in size, and would leave gaps between fixed segments.
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if cluster.interface is not None:
        environment["NCCL_SOCKET_IFNAME"] = environment["GLOO_SOCKET_IFNAME"] = cluster.interface
    environment.update(_OFFLINE)
    environment.update(cluster.environment)
    return environment
