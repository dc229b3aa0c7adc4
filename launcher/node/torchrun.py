"""The command and the environment of torchrun on one node: everything that the workers are told."""

import os
from collections.abc import Sequence
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.environment import Variable, WorkerEnvironment
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.node.rendezvous import Meeting, Place
from launcher.runs.store import python_module
from launcher.scheduler.container import inside

_FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun would die of the last two, and orphan
# torchrun's wait between passing a signal on and SIGKILL. Whoever sent the signal has a limit of its own
# (Slurm's grace time); torchrun must not be the one that cuts a save short.
_SHUTDOWN_TIMEOUT_S = 3600
# Nodes often have no way out: a library that tries would hang in a connection, not fail.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def torchrun_command(
    run: RunDir,
    config: RunConfig,
    cluster: ClusterConfig,
    place: Place,
    meeting: Meeting,
    logs: Path,
    mounts: Sequence[Path],
) -> list[str]:
    """torchrun with its c10d rendezvous, which restarts the workers of all nodes together.

    The static rendezvous lets each node restart on its own.
    """
    command = python_module(
        "torch.distributed.run",
        f"--nnodes={place.nodes}",
        f"--nproc-per-node={cluster.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-id={run.path.name}-{place.job}-{place.turn}",
        f"--rdzv-conf=is_host={int(place.is_first)}",
        f"--local-addr={meeting.address}",  # never a name lookup
        f"--max-restarts={config.launch.max_restarts}",
        "--monitor-interval=0.2",
        f"--signals-to-handle={_FORWARDED}",
        f"--shutdown-timeout={_SHUTDOWN_TIMEOUT_S}",
        f"--log-dir={logs}",  # its default is a folder in /tmp that stays behind
        "-m",
        "gpt.train",
        str(run.path),
    )
    return inside(command, cluster, mounts)


def worker_environment(
    cluster: ClusterConfig, place: Place, after: int, heartbeat: str, inherited: dict[str, str]
) -> dict[str, str]:
    """The environment of the workers: the node's, their place, a share of its cores, the cluster file's.

    `after` is the newest attempt before this turn: a later one that is another job's ends these workers.
    `heartbeat` names the socket at which the node task listens.
    """
    environment = {
        **inherited,
        **WorkerEnvironment(
            job=place.job,
            job_run=place.turn,
            after_attempt=after,
            can_requeue=place.job_id is not None,
            node=place.node,
            node_name=place.name,
            gpus_per_node=cluster.gpus_per_node,
            heartbeat=heartbeat,
        ).variables(),
    }
    if place.nodes > 1:
        # Agents of several nodes count restarts each for itself, so that a store which outlives a restart
        # cannot tell generations apart: a fresh one for each, on a port that torchrun finds.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if not cluster.gpus_per_node:
        cores = len(os.sched_getaffinity(0))
        if place.job_id is not None:  # not every site binds a job to what it asked for
            cores = min(cores, int(inherited.get("SLURM_CPUS_ON_NODE", cores)))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // cluster.processes))
    elif cluster.kind == "local":
        # submitit numbers the GPUs from 0, whatever the caller may use.
        allowed = inherited.get(Variable.CUDA_VISIBLE_DEVICES)
        if allowed:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(allowed.split(",")[: cluster.gpus_per_node])
    if cluster.interface is not None:
        environment["NCCL_SOCKET_IFNAME"] = environment["GLOO_SOCKET_IFNAME"] = cluster.interface
    environment.update(_OFFLINE)
    environment.update(cluster.environment)
    return environment
