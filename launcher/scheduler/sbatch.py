"""What is asked of Slurm for a run: ClusterConfig → submitit's parameters → the submission file.

What the cluster file omits is not asked: the site's defaults hold. Nothing here talks to Slurm.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.scheduler.container import needed_folders, srun_options

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_SRUN_HAS_THE_CPUS = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'  # srun ignores the latter since 22.05
_EVER_AGAIN = 1_000_000  # submitit counts time limits, and gives up after three


def slurm_executor(
    name: str,
    cluster: ClusterConfig,
    mounts: Sequence[Path],
    folder: Path,
    environment: Mapping[str, str],
    **more: Any,
) -> "SlurmExecutor":
    """submitit's executor for a job called `name`: one task a node, submitit's files in `folder`.

    `mounts` are the folders that a container must see; `environment` is what the tasks must find in
    theirs; `more` are further parameters of submitit.
    """
    from submitit import SlurmExecutor

    container = cluster.container
    is_task_inside = container is not None and container.runtime == "pyxis"
    python = container.python if container is not None and is_task_inside else None
    executor = SlurmExecutor(folder, max_num_timeout=_EVER_AGAIN, python=python)
    executor.update_parameters(**slurm_parameters(name, cluster, mounts, folder, environment), **more)
    return executor


def submission_text(run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str:
    """The file that sbatch would get for the first submission of `run`. Nothing is written."""
    mounts = needed_folders(run, config)
    folder = run.submission(1).path
    executor = slurm_executor(run.path.name, cluster, mounts, folder, run.code_environment)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_parameters(
    name: str, cluster: ClusterConfig, mounts: Sequence[Path], folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor."""
    # Where sbatch takes no environment along (SBATCH_EXPORT=NONE), srun would take none either.
    srun_args = ["--kill-on-bad-exit=1", "--export=ALL"]
    setup = [f"export {variable}={shlex.quote(value)}" for variable, value in environment.items()]
    setup += cluster.setup
    if cluster.cpus_per_process is not None:
        setup.append(_SRUN_HAS_THE_CPUS)
    if cluster.container is not None and cluster.container.runtime == "pyxis":
        srun_args += srun_options(cluster.container, mounts)
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
        "setup": setup,
        "teardown": _ending(folder),
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


def requeue_mark(folder: Path, job_id: str, turn: int) -> Path:
    """The file by which a node task without scontrol asks its batch script to requeue the job.

    It holds all the nodes to stay away from, separated by commas: they replace those that Slurm knows of.
    """
    return folder / f"requeue-{job_id}-{turn}"


def _ending(folder: Path) -> list[str]:
    """Shell lines for the end of the batch script: requeue a job whose node tasks could not do it.

    One has left a mark, because it has no scontrol in its container; or a preemption's SIGTERM (128 + 15)
    ended it while its Python still started: Slurm does not requeue what ends inside its grace time. Never a
    job that has been cancelled, or that runs a later turn by now.
    """
    mark = f"{shlex.quote(str(folder))}/requeue-$job-$turn"
    return [
        "code=$? turn=${SLURM_RESTART_COUNT:-0}",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}",
        f'while [ -e {mark} ] || [ "$code" = 143 ]; do',
        '    now=$(scontrol --oneliner show job "$job") || { sleep 5; continue; }',
        '    case "$now" in *" JobState=RUNNING "*" Restarts=$turn "*) ;; *) break ;; esac',
        f'    [ -e {mark} ] || case "$now" in *" PreemptTime=None "*) break ;; esac',
        '    scontrol requeue "$job" || { sleep 5; continue; }',
        # Refused while the old turn still ends: asked until it is taken, or this script is ended.
        f'    until [ ! -s {mark} ] || scontrol update JobId="$job" ExcNodeList="$(cat {mark})"; do',
        "        sleep 1",
        "    done",
        "    sleep 120",
        "done",
        'exit "$code"',
    ]
