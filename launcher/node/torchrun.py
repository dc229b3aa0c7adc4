"""The command and the environment of torchrun on one node: everything that the workers get to know."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.environment import WorkerEnvironment
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.node.rendezvous import Rendezvous
from launcher.runs.code_snapshot import python_module
from launcher.scheduler.container import inside
from launcher.scheduler.protocol import NodeIdentity
from launcher.scheduler.registry import scheduler_of

_FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun would die of the last two, and orphan
# How long torchrun waits between forwarding a signal and SIGKILL. The sender of the signal has a limit of its
# own (Slurm's grace time); torchrun must not be the one that cuts a save short.
_SHUTDOWN_TIMEOUT_S = 3600
# Nodes often have no route to the internet: a library that tries would hang in a connection, not fail.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# How torch's allocator is configured; the second name is the older one.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


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
