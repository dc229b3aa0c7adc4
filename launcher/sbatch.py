"""What is asked of Slurm for a run: ClusterConfig → submitit's parameters → the submission file.

What the cluster file omits is not asked: the site's defaults hold. Nothing here talks to Slurm.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.config import RunConfig
from gpt.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.container import needed_folders, requeue_lines, srun_options

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_SRUN_HAS_THE_CPUS = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'  # srun ignores the latter since 22.05
_EVER_AGAIN = 1_000_000  # submitit counts time limits, and gives up after three


def slurm_executor(
    name: str, cluster: ClusterConfig, mounts: Sequence[Path], folder: Path, **more: Any
) -> "SlurmExecutor":
    """submitit's executor for a job called `name`: one task a node, submitit's files in `folder`.

    `mounts` are the folders that a container must see; `more` are further parameters of submitit.
    """
    from submitit import SlurmExecutor

    container = cluster.container
    is_task_inside = container is not None and container.runtime == "pyxis"
    python = container.python if container is not None and is_task_inside else None
    executor = SlurmExecutor(folder, max_num_timeout=_EVER_AGAIN, python=python)
    executor.update_parameters(**slurm_parameters(name, cluster, mounts, folder), **more)
    return executor


def submission_text(run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str:
    """The file that sbatch would get for the first submission of `run`. Nothing is written."""
    mounts = needed_folders(run, config)
    executor = slurm_executor(run.path.name, cluster, mounts, run.submission / "0001")
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_parameters(
    name: str, cluster: ClusterConfig, mounts: Sequence[Path], folder: Path
) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor."""
    srun_args = ["--kill-on-bad-exit=1"]
    setup, teardown = list(cluster.setup), []
    if cluster.cpus_per_process is not None:
        setup.append(_SRUN_HAS_THE_CPUS)
    if cluster.container is not None and cluster.container.runtime == "pyxis":
        srun_args += srun_options(cluster.container, mounts)
        teardown = requeue_lines(folder)
    wanted: dict[str, Any] = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_process and cluster.cpus_per_process * cluster.processes,
        "mem": cluster.mem,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "gres": cluster.gres,
        "setup": setup or None,
        "teardown": teardown or None,
        "signal_delay_s": cluster.signal_delay_s,
        "srun_args": srun_args,
    }
    additional = cluster.sbatch_options
    if cluster.reservation is not None:
        additional["reservation"] = cluster.reservation
    wanted["additional_parameters"] = additional
    asked = {key: value for key, value in wanted.items() if value is not None}
    # submitit asks for five minutes and a wckey of its own unless it is told None.
    return {**asked, "time": cluster.time_limit_min, "wckey": None}
