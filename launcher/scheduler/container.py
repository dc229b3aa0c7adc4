"""Commands inside the cluster file's container: which of them run there, and how they are written.

The training processes run inside the image. What talks to Slurm stays outside, where scontrol and munge are.
With apptainer that is the node task; with Pyxis, whose containers only srun can start, it is the batch
script.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline.remote import is_remote
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig, Container


def inside(command: Sequence[str], cluster: ClusterConfig, mounts: Iterable[Path]) -> list[str]:
    """`command`, which starts with a Python interpreter, as the node task must run it."""
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return list(command)
    binds = [f"--bind={mount}" for mount in all_mounts(container, mounts)]
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, container.image, container.python, *command[1:]]


def srun_options(container: Container, mounts: Iterable[Path]) -> list[str]:
    """The options of srun that make Pyxis start the node tasks inside the image."""
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(all_mounts(container, mounts))}",
    ]


def all_mounts(container: Container, mounts: Iterable[Path]) -> list[str]:
    """SOURCE:TARGET of each folder that the processes need, under the same path as outside."""
    return [*dict.fromkeys(f"{path}:{path}" for path in mounts), *container.mounts]


def needed_folders(run: RunDir, config: RunConfig) -> list[Path]:
    """The folders that a run's processes use: its parent (for mlflow.db), the mirror, MLflow's, the data."""
    mirror = config.checkpoint.mirror
    mirrors = [Path(mirror)] if mirror is not None and not is_remote(mirror) else []
    uri = config.tracking.uri or ""
    databases = [Path(uri.removeprefix("sqlite:///")).parent] if uri.startswith("sqlite:////") else []
    return [run.path.parent, *mirrors, *databases, *(source.path for source in config.data.sources)]
