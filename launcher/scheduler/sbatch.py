"""What is asked of Slurm for a job: ClusterConfig → submitit's parameters → the batch script.

A field that the cluster file omits is not asked: the site's defaults hold. Nothing here talks to Slurm.
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

# Fields of the cluster file that only Slurm reads.
SLURM_FIELDS = (
    "partition",
    "time_limit",
    "account",
    "qos",
    "constraint",
    "exclude",
    "reservation",
    "gres",
    "mem",
    "cpus_per_process",
    "setup",
    "signal_delay_s",
    "container",
    "sbatch",
)
# Options of sbatch that may not be in [sbatch], and the field that sets each; None: the launcher sets it.
_FIELD_OF = {
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "cpus-per-task": "cpus_per_process",
    "partition": "partition",
    "time": "time_limit",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "reservation": "reservation",
    "gres": "gres",
    "mem": "mem",
    "signal": "signal_delay_s",
    "array": None,
    "output": None,
    "error": None,
    "open-mode": None,
    "wrap": None,
    "wait": None,
    "test-only": None,
}
# Since Slurm 22.05 srun ignores SLURM_CPUS_PER_TASK.
_EXPORT_CPUS = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
_UNLIMITED_TIMEOUTS = (
    1_000_000  # submitit counts the time limits that a job has met, and gives up after three
)


def option_problems(cluster: ClusterConfig) -> list[str]:
    """The options in [sbatch] that another field or the launcher itself decides."""
    problems = []
    for option in sbatch_options(cluster):
        if option.startswith("ntasks"):
            problems.append(f"sbatch.{option}: a node has one task, which starts processes_per_node.")
        elif (field := _FIELD_OF.get(option)) is not None:
            problems.append(f"sbatch.{option}: set it with the field {field}, outside [sbatch].")
        elif option in _FIELD_OF:
            problems.append(f"sbatch.{option}: the launcher itself needs this option; leave it out.")
    return problems


def sbatch_options(cluster: ClusterConfig) -> dict[str, Any]:
    """[sbatch] with sbatch's own spelling, and either `requeue`, the default, or `no-requeue`."""
    options = {name.replace("_", "-"): value for name, value in cluster.sbatch.items()}
    is_wanted = options.pop("requeue", True) is not False and options.pop("no-requeue", False) is False
    options["requeue" if is_wanted else "no-requeue"] = True
    return {name: value for name, value in options.items() if value is not False}


def slurm_executor(
    name: str,
    cluster: ClusterConfig,
    mounts: Sequence[Path],
    folder: Path,
    environment: Mapping[str, str],
    **more: Any,
) -> "SlurmExecutor":
    """submitit's executor for a job called `name`, with one task per node and submitit's files in `folder`.

    `mounts` are the folders that a container must see, `environment` must reach the tasks, and `more` are
    further parameters of submitit.
    """
    from submitit import SlurmExecutor

    container = cluster.container
    is_task_inside = container is not None and container.runtime == "pyxis"
    python = container.python if container is not None and is_task_inside else None
    executor = SlurmExecutor(folder, max_num_timeout=_UNLIMITED_TIMEOUTS, python=python)
    executor.update_parameters(**slurm_parameters(name, cluster, mounts, folder, environment), **more)
    return executor


def submission_text(run: RunDir, config: RunConfig, cluster: ClusterConfig) -> str:
    """The batch script of the first submission of `run`. Writes nothing."""
    mounts = needed_folders(run, config)
    folder = run.submission(1).path
    executor = slurm_executor(run.path.name, cluster, mounts, folder, run.code_environment)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def slurm_parameters(
    name: str, cluster: ClusterConfig, mounts: Sequence[Path], folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor."""
    # With SBATCH_EXPORT=NONE, srun would not pass on the environment either unless it is told to.
    srun_args = ["--kill-on-bad-exit=1", "--export=ALL"]
    setup = [f"export {variable}={shlex.quote(value)}" for variable, value in environment.items()]
    setup += cluster.setup
    if cluster.cpus_per_process is not None:
        setup.append(_EXPORT_CPUS)
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
        "teardown": _requeue_lines(folder),
        "signal_delay_s": cluster.signal_delay_s,
        "srun_args": srun_args,
    }
    additional = sbatch_options(cluster)
    if cluster.reservation is not None:
        additional["reservation"] = cluster.reservation
    wanted["additional_parameters"] = additional
    asked = {key: value for key, value in wanted.items() if value is not None}
    # By default submitit asks for five minutes and for a wckey of its own; None turns both off.
    return {**asked, "time": cluster.time_limit_min, "wckey": None}


def requeue_mark(folder: Path, job_id: str, job_run: int) -> Path:
    """The file with which a node task without scontrol asks its batch script to requeue the job.

    It holds all the nodes to avoid, separated by commas; they replace those that Slurm has recorded.
    """
    return folder / f"requeue-{job_id}-{job_run}"


def _requeue_lines(folder: Path) -> list[str]:
    """Shell lines at the end of the batch script: they requeue a job whose node tasks could not do it.

    Either a node task has left a mark, because its container has no scontrol, or a preemption's SIGTERM
    (128 + 15) ended it while its Python was still starting: Slurm does not requeue a job that ends inside
    its grace time. A job that has been cancelled, or that has started again since, is left alone.
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
        # Slurm refuses the update while the old job run still ends, so it is repeated until accepted.
        f'    until [ ! -s {mark} ] || scontrol update JobId="$job" ExcNodeList="$(cat {mark})"; do',
        "        sleep 1",
        "    done",
        "    sleep 120",
        "done",
        'exit "$code"',
    ]
